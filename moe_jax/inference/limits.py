"""Checks of prompts against the model's context and vocabulary."""

from collections.abc import Iterable, Mapping, Sequence

from moe_jax.adapters.method import AdapterMethod, require_language_model
from moe_jax.adapters.new_tokens import total_vocab_size
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import suggest
from moe_jax.errors import ConfigError, DataError

_OWN_TOKENIZER = "use that base's own tokenizer"

EncodedPrompt = tuple[Sequence[int], str | None, str]
"""Token ids, name of the adapter (None is the base) and name of the prompt in error messages."""


def context_of(model: ModelConfig, max_length: int | None) -> int:
    """Largest number of tokens of a prompt and its continuation together.

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


def check_buckets(buckets: Sequence[int], context: int) -> tuple[int, ...]:
    """Returns the buckets, with the context appended.

    Raises:
      ConfigError: the buckets do not ascend, or exceed the context.
    """
    lengths = list(buckets)
    if lengths != sorted(set(lengths)) or any(not 0 < length <= context for length in lengths):
        raise ConfigError(
            f"buckets: must be ascending lengths from 1 to the context of {context} tokens, got "
            f"{', '.join(map(str, lengths)) or 'none'}"
        )
    return tuple(lengths) if lengths[-1:] == [context] else (*lengths, context)


def check_prompts(
    prompts: Iterable[EncodedPrompt],
    *,
    max_new_tokens: int,
    context: int,
    vocab_size: int,
    adapters: Mapping[str, AdapterMethod],
    switch_length: int | None = None,
) -> None:
    """Rejects prompts that cannot be continued, before anything is computed.

    Args:
      prompts: prompts to check.
      max_new_tokens: number of tokens that may follow each prompt.
      context: largest number of tokens of a prompt and its continuation together.
      vocab_size: number of embeddings of the base.
      adapters: methods of the loaded adapters, by name.
      switch_length: see `frequency_switch`.

    Raises:
      ConfigError: an adapter is not loaded, or is a classifier.
      DataError: a prompt is empty, has token ids beyond the vocabulary, does not fit into the
        context together with its continuation, or the continuation would pass `switch_length`.
    """
    for tokens, adapter, where in prompts:
        if adapter is not None:
            if adapter not in adapters:
                raise ConfigError(
                    f"{where}: adapter {adapter!r}: is not loaded; {suggest(adapter, adapters)}"
                )
            require_language_model(adapters[adapter], adapter, "generate text")
        embeddings = total_vocab_size(vocab_size, [] if adapter is None else [adapters[adapter]])
        length = len(tokens)
        if not length:
            raise DataError(
                f"{where}: has no tokens; give at least one, such as the tokenizer's BOS token"
            )
        if not 0 <= min(tokens) <= max(tokens) < embeddings:
            is_known = max(tokens) < total_vocab_size(vocab_size, adapters.values())
            remedy = "leave out other adapters' new tokens" if is_known else _OWN_TOKENIZER
            model = "the base" if adapter is None else f"the base with adapter {adapter!r}"
            raise DataError(
                f"{where}: has ids from {min(tokens)} to {max(tokens)}, but {model} has "
                f"embeddings for 0 to {embeddings - 1}; {remedy}"
            )
        if length >= context:
            raise DataError(
                f"{where}: has {length} tokens, but the context holds {context}, answer included; "
                "shorten it"
            )
        if length + max_new_tokens > context:
            raise DataError(
                f"{where}: has {length} tokens, and with {max_new_tokens} new tokens does not fit "
                f"into the context of {context}; shorten it, or ask for at most "
                f"{context - length} new tokens"
            )
        if switch_length is not None and length <= switch_length < length + max_new_tokens:
            raise DataError(
                f"{where}: has {length} tokens, and with {max_new_tokens} new tokens passes "
                f"{switch_length}, where this model's longrope changes all frequencies; "
                + _remedies(switch_length, length, max_new_tokens, context)
            )


def _remedies(switch_length: int, length: int, max_new_tokens: int, context: int) -> str:
    """Advice for a prompt whose continuation would pass `switch_length`."""
    remedies = []
    if length < switch_length:
        remedies.append(f"ask for at most {switch_length - length} new tokens")
    if max_new_tokens < switch_length:
        remedies.append(f"shorten it to {switch_length - max_new_tokens} tokens")
    if switch_length + max_new_tokens < context:
        remedies.append(f"give a prompt of more than {switch_length} tokens")
    return ", or ".join(remedies) or "shorten it, and ask for fewer new tokens"


def check_requests(
    model: ModelConfig,
    adapters: Mapping[str, AdapterMethod],
    prompts: Sequence[Sequence[int]],
    names: Sequence[str | None],
    max_new_tokens: int,
    seed: int,
    context: int,
) -> None:
    """Rejects rows that cannot be continued side by side.

    Args:
      model: architecture of the base.
      adapters: methods of the loaded adapters, by name.
      prompts: token ids of each row's prompt.
      names: adapter of each row; None is the base.
      max_new_tokens: number of tokens that may follow each prompt.
      seed: random seed.
      context: largest number of tokens of a prompt and its continuation together.

    Raises:
      ConfigError: an adapter is unknown or a classifier, or a number is out of range.
      DataError: a prompt is empty, has token ids beyond the vocabulary, is too long, or is on
        another side of `frequency_switch` than the others.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be positive, got {max_new_tokens}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: must be between 0 and {2**32 - 1}, got {seed}")
    switch_length = frequency_switch(model)
    check_prompts(
        [
            (tokens, name, f"prompt {number}")
            for number, (tokens, name) in enumerate(zip(prompts, names, strict=True), 1)
        ],
        max_new_tokens=max_new_tokens,
        context=context,
        vocab_size=model.vocab_size,
        adapters=adapters,
        switch_length=switch_length,
    )
    if switch_length is not None:
        _check_sides(switch_length, [len(tokens) for tokens in prompts])


def frequency_switch(model: ModelConfig) -> int | None:
    """Length beyond which longrope changes all rotary frequencies; None without longrope."""
    for rope in (model.rope, model.sliding_rope):
        if rope is not None and rope.rope_type == "longrope":
            return rope.original_max_position_embeddings
    return None


def _check_sides(switch_length: int, lengths: Sequence[int]) -> None:
    """Rejects rows on both sides of a change of frequencies.

    The frequencies follow from the longest row of a batch, and a change midway would invalidate all
    cached keys. So all rows stay within `switch_length`, or all start beyond it.
    """
    short = [
        (number, length) for number, length in enumerate(lengths, 1) if length <= switch_length
    ]
    if short and len(short) < len(lengths):
        number, length = short[-1]
        raise DataError(
            f"prompt {number}: its {length} tokens stay below {switch_length}, where this model's "
            "longrope changes all frequencies, and another prompt does not; generate from each "
            "separately"
        )
