"""Compiled functions of generation: prefill, sampling and the decoding loop.

Letters: B rows, S tokens of the padded prompts, M length of the cache, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.inference.settings import SamplingConfig
from moe_jax.layers.kv_cache import CachePosition, apply_cache_updates
from moe_jax.layers.names import CACHE, CACHE_UPDATES
from moe_jax.models.adapted import apply
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.axes import BATCH, constrain

MAX_STEPS = 32
"""Largest number of tokens per row that one call of `decode` generates."""

NOT_FINITE = -1
"""Token id that `next_token` returns for a row whose logits are not finite; no token has it."""


class RowConstants(NamedTuple):
    """Per-row inputs that stay the same while a batch is decoded.

    Attributes:
      seed: uint32 [], the random seed.
      number: int32 [B], index of the row's prompt.
      sample: int32 [B], index of the row among the continuations of its prompt.
      start: int32 [B], first cache position that is not padding.
    """

    seed: Any
    number: Any
    sample: Any
    start: Any


class DecodeState(NamedTuple):
    """State of the decoding loop.

    Attributes:
      cache: keys and values of the positions before `position`.
      tokens: int32 [B], each row's newest token, which is not in the cache yet.
      position: int32 [], cache position of `tokens`.
      seen: bool [B, V], tokens in the row's prompt or answer; [B, 1] without a repetition penalty.
      done: bool [B], rows that have ended; their further tokens are ignored.
    """

    cache: Any
    tokens: jax.Array
    position: jax.Array
    seen: jax.Array
    done: jax.Array


_Carry = tuple[DecodeState, jax.Array, jax.Array]
"""The state, the generated tokens and their number."""


def prefill(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, Any],
    tokens: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, Any]:
    """Computes the prompts and fills the cache.

    Args:
      model: model with the layout of these rows and the length M of the cache.
      params: parameters of the base.
      adapters: adapter trees by their name in `AdapterRows`.
      tokens: int32 [B, S], padded on the left.
      start: int32 [B], position of each row's first token.

    Returns:
      The logits after the last token, float32 [B, V], and the cache.
    """
    is_token = jnp.arange(tokens.shape[1])[None] >= start[:, None]

    def last_logits(module: LlamaForCausalLM) -> jax.Array:
        hidden = module.hidden_states(tokens, segment_ids=is_token.astype(jnp.int32))
        return module.logits(hidden[:, -1])

    logits, collections = apply(model, params, adapters, last_logits, mutable=[CACHE])
    return logits, collections[CACHE]


def first_tokens(
    sampling: SamplingConfig,
    logits: jax.Array,
    cache: Any,
    position: jax.Array,
    seen: jax.Array,
    done: jax.Array,
    rows: RowConstants,
    eos_ids: jax.Array,
) -> DecodeState:
    """Samples the first token of each row from the logits of `prefill`."""
    return _sample(sampling, logits, DecodeState(cache, done, position, seen, done), rows, eos_ids)


def decode(
    model: LlamaForCausalLM,
    sampling: SamplingConfig,
    params: Any,
    adapters: Mapping[str, Any],
    state: DecodeState,
    rows: RowConstants,
    eos_ids: jax.Array,
    steps: jax.Array,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Generates `steps` more tokens of each row, or fewer if all rows end before.

    Args:
      model: model with the layout of these rows.
      sampling: rule by which tokens are chosen.
      params: parameters of the base.
      adapters: adapter trees by their name in `AdapterRows`.
      state: state to continue from.
      rows: per-row constants.
      eos_ids: int32 [n], ids that end a row.
      steps: int32 [], at most `MAX_STEPS`.

    Returns:
      The new state, the tokens, int32 [MAX_STEPS, B], and the number of valid steps in them.
    """

    def is_running(carry: _Carry) -> jax.Array:
        state, _, count = carry
        return (count < steps) & ~jnp.all(state.done)

    def step(carry: _Carry) -> _Carry:
        state, generated, count = carry
        position = CachePosition(state.position, rows.start)
        logits, updates = apply(
            model,
            params,
            adapters,
            LlamaForCausalLM.__call__,
            # A row whose logits were not finite has no valid token; its output is discarded.
            jnp.maximum(state.tokens, 0)[:, None],
            positions=(state.position - rows.start)[:, None],
            token_mask=~state.done[:, None],
            cache_position=position,
            cache=state.cache,
            mutable=[CACHE_UPDATES],
        )
        cache = apply_cache_updates(state.cache, updates[CACHE_UPDATES], position)
        state = state._replace(cache=cache, position=state.position + 1)
        state = _sample(sampling, logits[:, -1], state, rows, eos_ids)
        return state, generated.at[count].set(state.tokens), count + 1

    generated = jnp.zeros((MAX_STEPS, state.tokens.shape[0]), jnp.int32)
    return jax.lax.while_loop(is_running, step, (state, generated, jnp.int32(0)))


def _sample(
    sampling: SamplingConfig,
    logits: jax.Array,
    state: DecodeState,
    rows: RowConstants,
    eos_ids: jax.Array,
) -> DecodeState:
    """`state` with the token of its position sampled."""

    def key(number: jax.Array, sample: jax.Array, start: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(rows.seed), number)
        return jax.random.fold_in(jax.random.fold_in(key, sample), state.position - start)

    keys = jax.vmap(key)(rows.number, rows.sample, rows.start)
    tokens = constrain(next_token(logits, state.seen, keys, sampling), (BATCH,))
    seen = state.seen
    if sampling.repetition_penalty != 1:
        seen = seen | (tokens[:, None] == jnp.arange(seen.shape[1])[None])
    done = state.done | jnp.any(tokens[:, None] == eos_ids[None], axis=-1)
    return state._replace(tokens=tokens, seen=seen, done=done)


def next_token(
    logits: jax.Array, seen: jax.Array, keys: jax.Array, config: SamplingConfig
) -> jax.Array:
    """Samples a token for each row, from that row's logits, `seen` and key alone.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], tokens in the row's prompt or answer so far.
      keys: random keys [B]; unused by greedy decoding.
      config: sampling rule; static.

    Returns:
      Token ids, int32 [B]; `NOT_FINITE` where a logit is NaN or positive infinity.
    """
    filtered = filtered_logits(logits, seen, config)
    if config.is_greedy:
        tokens = jnp.argmax(filtered, axis=-1)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, filtered)
    # If any logit is NaN, so is the maximum, and the comparison is false.
    is_valid = jnp.max(logits, axis=-1) < jnp.inf
    return jnp.where(is_valid, tokens, NOT_FINITE).astype(jnp.int32)


def filtered_logits(logits: jax.Array, seen: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits of the distribution to sample from, float32 [B, V]; -inf at excluded tokens.

    Filters are applied in the order of transformers' `generate`: repetition penalty, temperature,
    top-k, top-p, min-p. Each works on the output of the one before.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], tokens in the row's prompt or answer so far.
      config: sampling rule; static.
    """
    if config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, penalized, logits)
    if config.is_greedy:
        return logits
    if config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if config.top_p < 1:
        logits = jnp.where(nucleus_mask(logits, config.top_p), logits, -jnp.inf)
    if config.min_p > 0:
        probs = jax.nn.softmax(logits, axis=-1)
        is_unlikely = probs < config.min_p * jnp.max(probs, axis=-1, keepdims=True)
        logits = jnp.where(is_unlikely, -jnp.inf, logits)
    return logits


def nucleus_mask(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Mask of the most likely tokens whose cumulative probability passes `top_p`, bool [B, V].

    Among equally likely tokens at the boundary, larger ids come first, as in transformers.
    """
    order = jnp.argsort(logits, axis=-1)  # ascending; stable, so that ties go by id
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    is_in = jnp.cumsum(probs, axis=-1) > 1 - top_p
    is_in = is_in.at[:, -1].set(True)
    return jnp.take_along_axis(is_in, jnp.argsort(order, axis=-1), axis=-1)
