"""What can be asked of a model's context, and what cannot."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import suggest
from moe_jax.data.collate import doubled_lengths
from moe_jax.errors import ConfigError, DataError

SHORTEST_BUCKET = 16


def context_of(model: ModelConfig, max_length: int | None) -> int:
    """Tokens of a prompt and its continuation together, at most.

    Raises:
      ConfigError: `max_length` is not positive, or more than the model's context.
    """
    context = model.max_position_embeddings
    if max_length is None:
        return context
    if not 0 < max_length <= context:
        raise ConfigError(
            f"max_length: must be between 1 and the model's context of {context} tokens, got "
            f"{max_length}"
        )
    return max_length


def default_buckets(context: int) -> tuple[int, ...]:
    """Lengths that prompts are padded to, each twice the one before, up to the context."""
    return doubled_lengths(SHORTEST_BUCKET, context)


def check_buckets(buckets: Sequence[int], context: int) -> tuple[int, ...]:
    """The buckets, with the context as the last one.

    Raises:
      ConfigError: they do not ascend, or exceed the context.
    """
    lengths = list(buckets)
    if lengths != sorted(set(lengths)) or any(not 0 < length <= context for length in lengths):
        raise ConfigError(
            f"buckets: must be ascending lengths from 1 to the context of {context} tokens, got "
            f"{', '.join(map(str, lengths)) or 'none'}"
        )
    return tuple(lengths) if lengths[-1:] == [context] else (*lengths, context)


def check_requests(
    model: ModelConfig,
    adapters: Iterable[str] | Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    names: Sequence[str | None],
    max_new_tokens: int,
    seed: int,
    context: int,
) -> None:
    """Refuses what cannot be continued.

    Args:
      model: the base's architecture.
      adapters: those that there are.
      prompts: of each row.
      names: of each row's adapter; None is the base.
      max_new_tokens: of each row.
      seed: of what is drawn.
      context: of a prompt and its continuation together, at most.

    Raises:
      ConfigError: an unknown adapter, or a number out of range.
      DataError: a prompt is empty, has ids that the model lacks, or is too long.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be positive, got {max_new_tokens}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: must be between 0 and {2**32 - 1}, got {seed}")
    known = tuple(adapters)
    for name in names:
        if name is not None and name not in known:
            raise ConfigError(
                f"adapter {name!r}: there is none of that name; {suggest(name, known)}"
            )
    for number, tokens in enumerate(prompts, 1):
        length = len(tokens)
        if not length:
            raise DataError(
                f"prompt {number}: has no tokens; give at least one, such as the tokenizer's bos"
            )
        if not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
            raise DataError(
                f"prompt {number}: has ids from {min(tokens)} to {max(tokens)}, but the model has "
                f"embeddings for 0 to {model.vocab_size - 1}; use the model's own tokenizer"
            )
        if length + max_new_tokens > context:
            fitting = context - length
            advice = f"give max_new_tokens of at most {fitting}" if fitting > 0 else "shorten it"
            raise DataError(
                f"prompt {number}: its {length} tokens and max_new_tokens of {max_new_tokens} make "
                f"{length + max_new_tokens}, more than the context of {context}; {advice}"
            )
    switch = frequency_switch(model)
    if switch is not None:
        _check_switch(switch, prompts, max_new_tokens)


def frequency_switch(model: ModelConfig) -> int | None:
    """Tokens from which on longrope changes all frequencies of rotary embeddings; None if never."""
    for rope in (model.rope, model.sliding_rope):
        if rope is not None and rope.rope_type == "longrope":
            return rope.original_max_position_embeddings
    return None


def _check_switch(switch: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuses to change the frequencies midway, which would need all keys anew.

    The frequencies follow from the longest row of a batch: all rows have to stay within the length
    of the short ones, or start beyond it.
    """
    lengths = [len(tokens) for tokens in prompts]
    if all(length + max_new_tokens <= switch for length in lengths):
        return
    short = [(number, length) for number, length in enumerate(lengths, 1) if length <= switch]
    if not short:
        return
    number, length = short[-1]
    prompt = f"prompt {number}: its {length} tokens"
    changes = f"{switch} tokens, from which on this model's longrope changes all frequencies"
    if length + max_new_tokens > switch:
        raise DataError(
            f"{prompt} and max_new_tokens of {max_new_tokens} pass {changes}; give max_new_tokens "
            f"of at most {switch - length}"
        )
    raise DataError(
        f"{prompt} stay below {changes}, and another prompt or its continuation does not; generate "
        "from them apart"
    )
