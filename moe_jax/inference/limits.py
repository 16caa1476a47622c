"""What can be asked of a model's context, and what cannot."""

from collections.abc import Iterable, Mapping, Sequence

from moe_jax.adapters.method import AdapterMethod, require_language_model
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import suggest
from moe_jax.data.batch import doubled_lengths
from moe_jax.errors import ConfigError, DataError

SHORTEST_BUCKET = 16

PromptLike = tuple[Sequence[int], str | None, str]
"""The ids of a prompt, whose it is (None is the base's), and what names it in messages."""


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


def check_prompts(
    prompts: Iterable[PromptLike],
    *,
    max_new_tokens: int,
    context: int,
    vocab_size: int,
    adapters: Mapping[str, AdapterMethod],
    switch: int | None = None,
) -> None:
    """Refuses, before anything is computed, what could not be continued.

    Args:
      prompts: all of them.
      max_new_tokens: that are to follow each.
      context: tokens of a prompt and its continuation together, at most.
      vocab_size: the model's number of embeddings.
      adapters: those that are loaded, by name.
      switch: see `frequency_switch`.

    Raises:
      ConfigError: an adapter is not loaded, or is a classifier.
      DataError: a prompt is empty, has ids that the model lacks, is longer than the context, alone
        or with what is to follow, or its answer would pass `switch`.
    """
    for tokens, adapter, where in prompts:
        if adapter is not None:
            if adapter not in adapters:
                raise ConfigError(
                    f"{where}: adapter {adapter!r}: none of that name is loaded; "
                    f"{suggest(adapter, adapters)}"
                )
            require_language_model(adapters[adapter], adapter, "generate text")
        length = len(tokens)
        if not length:
            raise DataError(
                f"{where}: has no tokens; give at least one, such as the tokenizer's bos"
            )
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise DataError(
                f"{where}: has ids from {min(tokens)} to {max(tokens)}, but the base has "
                f"embeddings for 0 to {vocab_size - 1}; use that base's own tokenizer"
            )
        if length >= context:
            raise DataError(
                f"{where}: has {length} tokens, but the context holds {context}, and the answer "
                "needs room too; shorten it"
            )
        if length + max_new_tokens > context:
            raise DataError(
                f"{where}: has {length} tokens, and with {max_new_tokens} new ones does not fit "
                f"into the context of {context}; shorten it, or ask for at most "
                f"{context - length} new tokens"
            )
        if switch is not None and length <= switch < length + max_new_tokens:
            raise DataError(
                f"{where}: has {length} tokens, and with {max_new_tokens} new ones passes "
                f"{switch}, from which on this model's longrope changes all frequencies; "
                + _ways_around(switch, length, max_new_tokens, context)
            )


def _ways_around(switch: int, length: int, max_new_tokens: int, context: int) -> str:
    """What helps a prompt whose answer would pass `switch`."""
    ways = []
    if length < switch:
        ways.append(f"ask for at most {switch - length} new tokens")
    if max_new_tokens < switch:
        ways.append(f"shorten it to {switch - max_new_tokens} tokens")
    if switch + max_new_tokens < context:
        ways.append(f"give a prompt of more than {switch} tokens")
    return ", or ".join(ways) or "shorten it, and ask for fewer new tokens"


def check_requests(
    model: ModelConfig,
    adapters: Mapping[str, AdapterMethod],
    prompts: Sequence[Sequence[int]],
    names: Sequence[str | None],
    max_new_tokens: int,
    seed: int,
    context: int,
) -> None:
    """Refuses rows that cannot be continued side by side.

    Args:
      model: the base's architecture.
      adapters: those that there are, by name.
      prompts: of each row.
      names: of each row's adapter; None is the base.
      max_new_tokens: of each row.
      seed: of what is drawn.
      context: of a prompt and its continuation together, at most.

    Raises:
      ConfigError: an adapter that is unknown or a classifier, or a number out of range.
      DataError: a prompt is empty, has ids that the model lacks, is too long, or does not go with
        the others.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be positive, got {max_new_tokens}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed: must be between 0 and {2**32 - 1}, got {seed}")
    switch = frequency_switch(model)
    check_prompts(
        [
            (tokens, name, f"prompt {number}")
            for number, (tokens, name) in enumerate(zip(prompts, names, strict=True), 1)
        ],
        max_new_tokens=max_new_tokens,
        context=context,
        vocab_size=model.vocab_size,
        adapters=adapters,
        switch=switch,
    )
    if switch is not None:
        _check_sides(switch, [len(tokens) for tokens in prompts])


def frequency_switch(model: ModelConfig) -> int | None:
    """Tokens from which on longrope changes all frequencies of rotary embeddings; None if never."""
    for rope in (model.rope, model.sliding_rope):
        if rope is not None and rope.rope_type == "longrope":
            return rope.original_max_position_embeddings
    return None


def _check_sides(switch: int, lengths: Sequence[int]) -> None:
    """Refuses rows of both sides of a change of frequencies.

    The frequencies follow from the longest row of a batch, and changing them midway would need all
    keys anew: all rows have to stay within the length of the short ones, or start beyond it.
    """
    short = [(number, length) for number, length in enumerate(lengths, 1) if length <= switch]
    if short and len(short) < len(lengths):
        number, length = short[-1]
        raise DataError(
            f"prompt {number}: its {length} tokens stay below {switch} tokens, from which on this "
            "model's longrope changes all frequencies, and another prompt does not; generate from "
            "them apart"
        )
