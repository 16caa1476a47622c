"""What is compiled for generation: reading the prompts, and steps of one token each.

Letters: B rows, S slots of the padded prompts, M of the whole cache, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.adapters.tree import to_collection
from moe_jax.inference.sampling import SamplingConfig, next_token
from moe_jax.layers.kv_cache import CachePlace, updated
from moe_jax.layers.names import ADAPTERS, CACHE, CACHE_UPDATES, PARAMS
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.axes import BATCH, constrain

MAX_STEPS = 32
"""Tokens of a row that one call of `decode` makes, at most."""


class Drawing(NamedTuple):
    """What each row's random numbers come from, and where its prompt starts.

    Attributes:
      seed: uint32 [].
      number: int32 [B], of the prompt.
      sample: int32 [B], which of its continuations.
      start: int32 [B], the first slot that is not padding.
    """

    seed: Any
    number: Any
    sample: Any
    start: Any


class State(NamedTuple):
    """How far decoding is.

    Attributes:
      cache: of the slots before `slot`.
      tokens: int32 [B], each row's newest token, which is not in the cache yet.
      slot: int32 [], its place.
      seen: bool [B, V], the tokens of each row so far; [B, 1] where nobody reads them.
      done: bool [B], the rows that have ended; what they go on to make is not read.
    """

    cache: Any
    tokens: jax.Array
    slot: jax.Array
    seen: jax.Array
    done: jax.Array


_Carry = tuple[State, jax.Array, jax.Array]
"""The state, the tokens made and how many they are."""


def read_prompts(
    model: LlamaForCausalLM,
    cache_length: int,
    params: Any,
    adapters: Mapping[str, Any],
    tokens: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, Any]:
    """Fills the cache.

    Args:
      model: with segments that fit the rows.
      cache_length: M.
      params: the base's.
      adapters: `{segment: tree}`.
      tokens: int32 [B, S], padded on the left.
      start: int32 [B], each row's first token.

    Returns:
      The logits after the last token, float32 [B, V], and the cache.
    """
    is_token = jnp.arange(tokens.shape[1]) >= start[:, None]
    logits, made = model.apply(
        {PARAMS: params, ADAPTERS: to_collection(adapters)},
        tokens,
        segment_ids=is_token.astype(jnp.int32),
        cache_length=cache_length,
        last_only=True,
        mutable=[CACHE],
    )
    assert isinstance(logits, jax.Array)
    return logits[:, -1], made[CACHE]


def first_tokens(
    sampling: SamplingConfig,
    logits: jax.Array,
    cache: Any,
    slot: jax.Array,
    seen: jax.Array,
    done: jax.Array,
    drawing: Drawing,
    eos_ids: jax.Array,
) -> State:
    """The state at the first token of each row, from what `read_prompts` returned."""
    return _picked(sampling, logits, State(cache, done, slot, seen, done), drawing, eos_ids)


def decode(
    model: LlamaForCausalLM,
    sampling: SamplingConfig,
    params: Any,
    adapters: Mapping[str, Any],
    state: State,
    drawing: Drawing,
    eos_ids: jax.Array,
    steps: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    """So many further tokens of each row, or fewer if all rows end before.

    Args:
      model: with segments that fit the rows.
      sampling: how tokens are picked.
      params: the base's.
      adapters: `{segment: tree}`.
      state: where decoding stands.
      drawing: of the rows.
      eos_ids: int32 [n], the ids that end a row.
      steps: int32 [], at most `MAX_STEPS`.

    Returns:
      The new state, the tokens int32 [MAX_STEPS, B], and how many of those are there.
    """
    variables = {PARAMS: params, ADAPTERS: to_collection(adapters)}

    def goes_on(carry: _Carry) -> jax.Array:
        state, _, count = carry
        return (count < steps) & ~jnp.all(state.done)

    def step(carry: _Carry) -> _Carry:
        state, made, count = carry
        place = CachePlace(state.slot, drawing.start)
        logits, updates = model.apply(
            {**variables, CACHE: state.cache},
            # Of a row whose logits were not finite, any token will do.
            jnp.maximum(state.tokens, 0)[:, None],
            positions=(state.slot - drawing.start)[:, None],
            token_mask=~state.done[:, None],
            place=place,
            mutable=[CACHE_UPDATES],
        )
        assert isinstance(logits, jax.Array)
        cache = updated(state.cache, updates[CACHE_UPDATES], place)
        state = state._replace(cache=cache, slot=state.slot + 1)
        state = _picked(sampling, logits[:, -1], state, drawing, eos_ids)
        return state, made.at[count].set(state.tokens), count + 1

    made = jnp.zeros((MAX_STEPS, state.tokens.shape[0]), jnp.int32)
    return jax.lax.while_loop(goes_on, step, (state, made, jnp.int32(0)))


def _picked(
    sampling: SamplingConfig,
    logits: jax.Array,
    state: State,
    drawing: Drawing,
    eos_ids: jax.Array,
) -> State:
    """`state` with the token that comes to stand at its slot."""

    def key(number: jax.Array, sample: jax.Array, start: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(drawing.seed), number)
        return jax.random.fold_in(jax.random.fold_in(key, sample), state.slot - start)

    keys = jax.vmap(key)(drawing.number, drawing.sample, drawing.start)
    tokens = constrain(next_token(logits, state.seen, keys, sampling), (BATCH,))
    seen = state.seen
    if sampling.repetition_penalty != 1:
        seen = seen | (tokens[:, None] == jnp.arange(seen.shape[1]))
    done = state.done | jnp.any(tokens[:, None] == eos_ids, axis=-1)
    return state._replace(tokens=tokens, seen=seen, done=done)
