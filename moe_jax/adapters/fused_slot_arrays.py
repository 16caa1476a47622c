"""Operands of the kernels of `moe_jax.adapters.fused_slots`.

Letters are those of `moe_jax.adapters.mixlora`; R is padded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.layers.dropout import dropout_words

TOKENS = 64
"""Tokens of a tile."""


class Settings(NamedTuple):
    """Static settings.

    Attributes:
      activation: activation function of the gate.
      slots: C.
      experts: E.
      rank: R.
      blocks: blocks of features of a program of the kernels over tokens.
      drops: True if there is dropout before the down projection's A.
    """

    activation: Callable[[jax.Array], jax.Array]
    slots: int
    experts: int
    rank: int
    blocks: int
    drops: bool


class Arrays(NamedTuple):
    """Differentiable arrays of the slots.

    Attributes:
      gate, up: frozen products [T, F].
      z_gate, z_up: codes of each slot's expert, [T, C R].
      b_gate, b_up: [E R, F].
      a_down: [F, E R].
      weights: float32 [T, C].
    """

    gate: Any
    up: Any
    z_gate: Any
    z_up: Any
    b_gate: Any
    b_up: Any
    a_down: Any
    weights: Any


class Orders(NamedTuple):
    """Experts of the slots, orders of tokens and slots, and dropout before `a_down`.

    Attributes:
      experts: expert of each slot, int32 [T, C]; -1 for none.
      tokens: tokens sorted by their experts, int32 [T] padded to whole tiles with T.
      slots: slots of all tokens, numbered t C + c, sorted by expert, int32 [T C].
      starts: position in `slots` of the first slot of each expert, and the end, int32 [E + 1].
      token_words, feature_words: uint32 [T, C] and [C, F], see `dropout_words`; this and the next
        two are read if `Settings.drops`.
      limit: uint32 [1], see there.
      gain: float32 [1], factor of what is kept.
    """

    experts: Any
    tokens: Any
    slots: Any
    starts: Any
    token_words: Any
    feature_words: Any
    limit: Any
    gain: Any


def sorted_slots(dispatch: jax.Array) -> tuple[jax.Array, ...]:
    """The first four arrays of `Orders`.

    Args:
      dispatch: one-hot [T, C, E]; zero for a slot without an expert.
    """
    tokens, slots, experts = dispatch.shape
    chosen = jnp.argmax(dispatch, axis=-1).astype(jnp.int32)
    chosen = jnp.where(jnp.any(dispatch != 0, axis=-1), chosen, -1)
    # The first two slots decide the order: with more, few tokens have all experts in common.
    key = chosen[:, 0] if slots == 1 else chosen[:, 0] * (experts + 1) + chosen[:, 1]
    order = jnp.argsort(key).astype(jnp.int32)
    order = jnp.pad(order, (0, -tokens % TOKENS), constant_values=tokens)
    flat = chosen.reshape(-1)
    by_expert = jnp.argsort(flat).astype(jnp.int32)
    smaller = flat[None, :] < jnp.arange(experts + 1, dtype=jnp.int32)[:, None]
    return chosen, order, by_expert, jnp.sum(smaller, axis=1, dtype=jnp.int32)


def dropout_arrays(
    rate: jax.Array | None, keys: jax.Array | None, sizes: tuple[int, int, int]
) -> tuple[jax.Array, ...]:
    """The last four arrays of `Orders`.

    Args:
      rate: see `SlotInputs.down_dropout`.
      keys: two dropout keys for each slot, of which the second is used; None drops nothing.
      sizes: T, C and F.
    """
    tokens, slots, features = sizes
    if rate is None or keys is None:
        word = jnp.zeros((1, 1), jnp.uint32)
        return word, word, word[0], jnp.ones(1, jnp.float32)
    words = [dropout_words((tokens, features), rate, keys[c, 1]) for c in range(slots)]
    of_tokens, of_features, (limit, *_) = zip(*words, strict=True)
    gain = 1.0 / (1.0 - jnp.float32(rate))
    return jnp.concatenate(of_tokens, axis=1), jnp.concatenate(of_features), limit[None], gain[None]
