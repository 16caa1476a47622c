"""Compiled functions of sampling: logits into tokens, by the settings of each row.

They draw the tokens that `moe_jax.inference.decoding` draws with the same settings. There the
settings are static; here they are arrays, so that one program serves all requests. What no row of a
call asks for, such as a sort of the vocabulary, is not computed.

Letters: B rows of the call, R rows that the engine has, V tokens of the vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.inference.decoding import NOT_FINITE, nucleus_mask

TOP_LOGPROBS = 20
"""Number of alternatives that a row's log-probabilities list at most, as in OpenAI's API."""


class RowSettings(NamedTuple):
    """Settings of each row, arrays [B]; see `SamplingConfig` and OpenAI's API.

    Attributes:
      temperature: float32; 0 is greedy decoding.
      top_k: int32; V or more is no limit.
      top_p, min_p, repetition_penalty: float32.
      presence_penalty: float32, subtracted from the logits of tokens that the answer has.
      frequency_penalty: float32, the same for each time that the answer has the token.
      seed: uint32.
      sample: int32, index among the answers to the row's prompt.
      wants_logprobs: bool, true if log-probabilities are returned.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any
    sample: Any
    wants_logprobs: Any


class TokenHistory(NamedTuple):
    """Tokens of each of the engine's rows; the last row takes what is written for padding.

    Attributes:
      counts: int32 [R + 1, V], how often the answer has each token.
      in_prompt: bool [R + 1, V], true for tokens of the prompt.
    """

    counts: jax.Array
    in_prompt: jax.Array


class Chosen(NamedTuple):
    """Next tokens of a call's rows.

    Attributes:
      tokens: int32 [B]; `NOT_FINITE` where a logit is NaN or positive infinity.
      logprobs: float32 [B], log-probability of the token under the model.
      top_tokens: int32 [B, n], most probable tokens; n is `TOP_LOGPROBS`, or V if that is less.
      top_logprobs: float32 [B, n].

    Log-probabilities are of the logits before penalties and temperature, in float32. They are zeros
    if no row of the call wants them.
    """

    tokens: Any
    logprobs: Any
    top_tokens: Any
    top_logprobs: Any


def begin_row(
    history: TokenHistory, slot: jax.Array, in_prompt: jax.Array, counts: Any = 0
) -> TokenHistory:
    """The history with a row of a prompt of the tokens bool [V], and an answer of int32 [V]."""
    return TokenHistory(
        history.counts.at[slot].set(counts), history.in_prompt.at[slot].set(in_prompt)
    )


def choose_tokens(
    logits: jax.Array,
    history: TokenHistory,
    settings: RowSettings,
    slots: jax.Array,
    lengths: jax.Array,
) -> tuple[Chosen, TokenHistory]:
    """Samples the next token of each row.

    Args:
      logits: float32 [B, V].
      history: tokens of the engine's rows.
      settings: settings of the call's rows.
      slots: int32 [B], index of each row in the engine's rows.
      lengths: int32 [B], number of tokens of each row so far.

    Returns:
      The tokens, and the history with them.
    """
    penalized = _penalized(logits, history, settings, slots)
    tokens = jnp.argmax(penalized, axis=-1)
    drawn = jax.lax.cond(
        jnp.any(settings.temperature > 0),
        lambda: _drawn(penalized, settings, lengths),
        lambda: jnp.zeros_like(tokens),
    )
    tokens = jnp.where(settings.temperature > 0, drawn, tokens)
    # If any logit is NaN, so is the maximum, and the comparison is false.
    is_valid = jnp.max(logits, axis=-1) < jnp.inf
    counts = history.counts.at[slots, tokens].add(1)
    tokens = jnp.where(is_valid, tokens, NOT_FINITE).astype(jnp.int32)
    logprobs = token_logprobs(logits, tokens, jnp.any(settings.wants_logprobs))
    return Chosen(tokens, *logprobs), history._replace(counts=counts)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, is_wanted: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last three fields of `Chosen`, of tokens [B] and logits [B, V]."""
    count = min(TOP_LOGPROBS, logits.shape[-1])

    def computed() -> tuple[jax.Array, jax.Array, jax.Array]:
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        own = jnp.take_along_axis(log_probs, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
        top, top_tokens = jax.lax.top_k(log_probs, count)
        return own, top_tokens.astype(jnp.int32), top

    def zeros() -> tuple[jax.Array, jax.Array, jax.Array]:
        shape = (logits.shape[0], count)
        return jnp.zeros(shape[:1]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)

    return jax.lax.cond(is_wanted, computed, zeros)


def _penalized(
    logits: jax.Array, history: TokenHistory, settings: RowSettings, slots: jax.Array
) -> jax.Array:
    """Logits [B, V] after the penalties for tokens that occurred before."""

    def computed() -> jax.Array:
        counts = history.counts[slots]
        is_in_answer = counts > 0
        repetition = settings.repetition_penalty[:, None]
        result = jnp.where(logits < 0, logits * repetition, logits / repetition)
        result = jnp.where(is_in_answer | history.in_prompt[slots], result, logits)
        result = result - settings.frequency_penalty[:, None] * counts.astype(logits.dtype)
        return result - settings.presence_penalty[:, None] * is_in_answer.astype(logits.dtype)

    is_needed = (
        (settings.repetition_penalty != 1)
        | (settings.presence_penalty != 0)
        | (settings.frequency_penalty != 0)
    )
    return jax.lax.cond(jnp.any(is_needed), computed, lambda: logits)


def _drawn(logits: jax.Array, settings: RowSettings, lengths: jax.Array) -> jax.Array:
    """Tokens [B] drawn from logits [B, V]; those of greedy rows are not valid."""

    def key(seed: jax.Array, sample: jax.Array, length: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), 0)  # one prompt, number 0
        return jax.random.fold_in(jax.random.fold_in(key, sample), length)

    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
    logits = logits / temperature[:, None]
    logits = jax.lax.cond(
        jnp.any((settings.top_k < logits.shape[-1]) | (settings.top_p < 1)),
        lambda: _largest(logits, settings),
        lambda: logits,
    )
    probs = jax.nn.softmax(logits, axis=-1)
    is_unlikely = probs < settings.min_p[:, None] * jnp.max(probs, axis=-1, keepdims=True)
    logits = jnp.where(is_unlikely, -jnp.inf, logits)
    keys = jax.vmap(key)(settings.seed, settings.sample, lengths)
    return jax.vmap(jax.random.categorical)(keys, logits)


def _largest(logits: jax.Array, settings: RowSettings) -> jax.Array:
    """Logits [B, V] after top-k and top-p."""
    vocabulary = logits.shape[-1]
    ascending = jnp.sort(logits, axis=-1)
    place = jnp.clip(vocabulary - settings.top_k, 0, vocabulary - 1)
    smallest = jnp.take_along_axis(ascending, place[:, None], axis=-1)
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
    kept = nucleus_mask(logits, settings.top_p[:, None])
    return jnp.where(kept | (settings.top_p >= 1)[:, None], logits, -jnp.inf)
