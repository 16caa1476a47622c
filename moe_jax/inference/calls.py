"""Generation as a short call, for notebooks and scripts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from moe_jax.errors import ConfigError
from moe_jax.inference.prompts import Message, Prompt, PromptFormat
from moe_jax.inference.sampling import SamplingConfig
from moe_jax.inference.session import InferenceSession
from moe_jax.inference.text import MAX_NEW_TOKENS, GenerationConfig

PromptLike = str | Sequence[Message]
"""A text, or a conversation: messages with role and content, the last one not the assistant's."""


class Opened(Protocol):
    """What is ready to generate, such as `moe_jax.load_base` and `moe_jax.AdaptedModel` give."""

    @property
    def session(self) -> InferenceSession: ...


def generate(
    model: Opened | str | Path,
    prompts: str | Sequence[PromptLike],
    adapter: str | Sequence[str | None] | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    samples: int = 1,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    template: str | None = None,
    batch_size: int = 8,
) -> list[str]:
    """Answers prompts, side by side.

    Args:
      model: a base or an adapted model in memory, or the base's folder or hub id.
      prompts: a text, or several texts or conversations.
      adapter: whose answers; None is the base as it is. A list has one for each prompt.
      max_new_tokens: of an answer, at most.
      temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingConfig`; by default the
        likeliest token is taken each time.
      samples: answers to each prompt.
      stop: texts before which an answer ends.
      seed: of what is drawn.
      chat, system, template: what stands around a text; see `PromptFormat`.
      batch_size: answers that are written side by side.

    Returns:
      The answers, those to a prompt next to each other.

    Raises:
      UserError: what is wrong, in one line.
    """
    config = GenerationConfig(
        sampling=SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty),
        max_new_tokens=max_new_tokens,
        samples=samples,
        stop=_texts(stop),
        seed=seed,
    )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size: must be a positive number, got {batch_size!r}")
    session = _session(model)
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    made, is_chat = _prompts(session, given, adapter, PromptFormat(chat, system, template))
    session.check(made, config)
    found = {}
    for answers in session.text_generator(is_chat=is_chat).answers(made, config, batch_size):
        found |= {(answer.prompt, answer.sample): answer.text for answer in answers}
    return [found[place] for place in sorted(found)]


def generate_stream(
    model: Opened | str | Path,
    prompt: PromptLike,
    adapter: str | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    template: str | None = None,
) -> Iterator[str]:
    """Answers one prompt, and gives the text while it is written.

    Args: see `generate`.

    Returns:
      The answer in pieces. They make up what `generate` gives for this prompt alone.

    Raises:
      UserError: what is wrong, before the first piece.
    """
    config = GenerationConfig(
        sampling=SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty),
        max_new_tokens=max_new_tokens,
        stop=_texts(stop),
        seed=seed,
    )
    session = _session(model)
    made, is_chat = _prompts(session, [prompt], adapter, PromptFormat(chat, system, template))
    session.check(made, config)
    pieces = session.text_generator(is_chat=is_chat).stream(made[0], config)
    return (piece.text for piece in pieces if piece.text)


def _session(model: Opened | str | Path) -> InferenceSession:
    return InferenceSession.open(model, {}) if isinstance(model, str | Path) else model.session


def _texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _prompts(
    session: InferenceSession,
    given: Sequence[PromptLike],
    adapter: str | Sequence[str | None] | None,
    prompt_format: PromptFormat,
) -> tuple[list[Prompt], bool]:
    """The prompts, and whether any is a conversation."""
    if not given:
        raise ConfigError("prompts: none is given")
    if adapter is None or isinstance(adapter, str):
        names = [adapter] * len(given)
    else:
        names = list(adapter)
    if len(names) != len(given):
        raise ConfigError(f"adapter: {len(names)} names for {len(given)} prompts; give one each")
    encoder = session.encoder(prompt_format)
    made = []
    for number, (prompt, name) in enumerate(zip(given, names, strict=True), 1):
        where = f"prompt {number}" if len(given) > 1 else "the prompt"
        if isinstance(prompt, str):
            tokens = encoder.text(prompt, where)
        else:
            tokens = encoder.conversation(prompt, where)
        made.append(Prompt(tokens, name, where))
    return made, prompt_format.chat or not all(isinstance(prompt, str) for prompt in given)
