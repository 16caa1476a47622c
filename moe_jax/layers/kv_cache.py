"""The cache of decoding: keys and values of earlier tokens, and values of adapters.

Prefill fills the cache, each decoding step reads it and adds to it.

- Prefill: apply a model with `cache_length=M` and the collection `cache` mutable. Rows are padded
  on the left, so that the next token's cache position is the same in all rows. Keys and values
  become `layers/self_attn/key` and `value` [L, B, K, M, Q]: heads before positions, as attention's
  products read them, so that no transpose is needed.
- Decoding: apply the model with the cache among the variables, a `CachePosition`, and the
  collection `cache_updates` mutable; `apply_cache_updates` then writes these updates into the
  cache. A layer never writes the cache itself: under the scan over layers each step would read and
  write all of it.

Other values written with `write_cache` have the same shape from call to call.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.names import CACHE, CACHE_UPDATES
from moe_jax.sharding.axes import BATCH, CACHE_KV_HEADS, HEAD_WIDTH, LENGTH, constrain

BY_POSITION = ("key", "value")
"""Names of the values that each token adds to the cache."""

BY_ROW = ("expert_counts",)
"""Names of the values that each row of the batch has, [L, B, ...]. Any other is of an adapter."""

_AXES = (BATCH, CACHE_KV_HEADS, LENGTH, HEAD_WIDTH)
_POSITION_AXIS = -2
"""Axis of the cache positions, with and without a leading axis of layers."""


class KeysAndValues(NamedTuple):
    """Keys and values of a layer.

    Attributes:
      key: [B, S, K, Q], rotated.
      value: [B, S, K, Q].
      cached: keys and values [B, K, M, Q] of earlier tokens; None outside of decoding.
    """

    key: jax.Array
    value: jax.Array
    cached: tuple[jax.Array, jax.Array] | None = None


class CachePosition(NamedTuple):
    """Position in the cache of the tokens of a call.

    Attributes:
      offset: int32 [], cache position of the first token; the others follow.
      start: int32 [B], first cache position of each row; those before it are padding.
    """

    offset: jax.Array
    start: jax.Array


def read_cache(module: nn.Module, name: str) -> jax.Array | None:
    """The value of `module` in the cache as `name`; None outside of decoding."""
    return module.get_variable(CACHE, name) if module.has_variable(CACHE, name) else None


def write_cache(module: nn.Module, name: str, value: jax.Array) -> None:
    """Writes `value` for the next call, if the cache is filled or updated."""
    if module.is_initializing():
        return
    for collection in (CACHE, CACHE_UPDATES):
        if module.is_mutable_collection(collection):
            module.put_variable(collection, name, value)


def fill_cache(module: nn.Module, key: jax.Array, value: jax.Array, length: int) -> None:
    """Creates the cache of a layer.

    Args:
      module: the attention module.
      key: [B, S, K, Q], rotated.
      value: [B, S, K, Q].
      length: M, at least S.
    """
    rest = length - key.shape[1]
    if rest < 0:
        raise ValueError(f"{key.shape[1]} tokens do not fit into a cache of {length}")
    for name, array in zip(BY_POSITION, (key, value), strict=True):
        padded = jnp.pad(heads_first(array), ((0, 0), (0, 0), (0, rest), (0, 0)))
        write_cache(module, name, constrain(padded, _AXES))


def extend_cache(
    module: nn.Module, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values [B, K, M, Q] of earlier tokens, and adds those of new ones.

    Args:
      module: the attention module.
      key: [B, S, K, Q] of the new tokens, rotated.
      value: [B, S, K, Q].
    """
    earlier = [read_cache(module, name) for name in BY_POSITION]
    for name, array in zip(BY_POSITION, (key, value), strict=True):
        write_cache(module, name, constrain(heads_first(array), _AXES))
    cached_key, cached_value = earlier
    if cached_key is None or cached_value is None:
        raise ValueError("decoding needs a cache; apply the model with cache_length first")
    return cached_key, cached_value


def apply_cache_updates(cache: Any, updates: Any, position: CachePosition) -> Any:
    """The whole cache with the updates of a call.

    Args:
      cache: the collection before the call.
      updates: the collection `cache_updates` of the call.
      position: position of the call's tokens.
    """
    merged = dict(cache)
    for name, new in updates.items():
        if isinstance(new, Mapping):
            merged[name] = apply_cache_updates(cache[name], new, position)
        elif name in BY_POSITION:
            merged[name] = jax.lax.dynamic_update_slice_in_dim(
                cache[name], new, position.offset, axis=_POSITION_AXIS
            )
        else:
            merged[name] = new
    return merged


def heads_first(array: jax.Array) -> jax.Array:
    """[B, S, K, Q] to [B, K, S, Q], as attention's products read keys and values."""
    return jnp.swapaxes(array, 1, 2)
