"""What decoding remembers of the tokens before: their keys and values, and what adapters add.

One call fills the cache (prefill), many read it (decoding):

- To fill it, apply the model with `cache_length=M` and the collection `cache` mutable. Rows are
  padded on the left, so that the next token's slot is the same in all of them. Keys and values
  become `layers/self_attn/key` and `value` [L, B, K, M, Q]: heads before slots, as the products of
  attention want them, so that reading them moves nothing.
- To continue, apply it with the cache among the variables, a `CachePosition`, and the collection
  `cache_updates` mutable; `updated` then puts what that made into the cache. A layer never writes
  the cache itself: under the scan over layers each step would read and write all of it.

What else is remembered with `remember` keeps its shape from call to call.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.names import CACHE, CACHE_UPDATES
from moe_jax.sharding.axes import BATCH, CACHE_KV_HEADS, HEAD_WIDTH, LENGTH, constrain

_SLOTTED = ("key", "value")
_AXES = (BATCH, CACHE_KV_HEADS, LENGTH, HEAD_WIDTH)
_SLOTS = 3
"""The axis of the slots, behind that of the layers."""


class CachePosition(NamedTuple):
    """Where in the cache the tokens of a call stand.

    Attributes:
      slot: int32 [], of the first one; those of the others follow.
      start: int32 [B], each row's first slot; those before it are padding.
    """

    slot: jax.Array
    start: jax.Array


def cached(module: nn.Module, name: str) -> jax.Array | None:
    """What `module` remembered as `name`; None outside of decoding."""
    return module.get_variable(CACHE, name) if module.has_variable(CACHE, name) else None


def remember(module: nn.Module, name: str, value: jax.Array) -> None:
    """Keeps `value` for the next call, where there will be one."""
    if module.is_initializing():
        return
    for collection in (CACHE, CACHE_UPDATES):
        if module.is_mutable_collection(collection):
            module.put_variable(collection, name, value)


def fill_cache(module: nn.Module, key: jax.Array, value: jax.Array, length: int) -> None:
    """Makes the cache of a layer.

    Args:
      module: the attention.
      key: [B, S, K, Q], rotated.
      value: [B, S, K, Q].
      length: M, at least S.
    """
    rest = length - key.shape[1]
    if rest < 0:
        raise ValueError(f"{key.shape[1]} tokens do not fit into a cache of {length}")
    for name, array in zip(_SLOTTED, (key, value), strict=True):
        padded = jnp.pad(_heads_first(array), ((0, 0), (0, 0), (0, rest), (0, 0)))
        remember(module, name, constrain(padded, _AXES))


def extend_cache(
    module: nn.Module, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Hands out the keys and values [B, K, M, Q] of the tokens before, and adds new ones.

    Args:
      module: the attention.
      key: [B, S, K, Q] of the new tokens, rotated.
      value: [B, S, K, Q].
    """
    before = [cached(module, name) for name in _SLOTTED]
    for name, array in zip(_SLOTTED, (key, value), strict=True):
        remember(module, name, constrain(_heads_first(array), _AXES))
    cached_key, cached_value = before
    if cached_key is None or cached_value is None:
        raise ValueError("decoding needs a cache that a call before has filled")
    return cached_key, cached_value


def updated(cache: Any, updates: Any, place: CachePosition) -> Any:
    """The whole cache with what a call made for it.

    Args:
      cache: the collection before the call.
      updates: the collection `cache_updates` of the call.
      place: of the call.
    """
    merged = dict(cache)
    for name, new in updates.items():
        if isinstance(new, Mapping):
            merged[name] = updated(cache[name], new, place)
        elif name in _SLOTTED:
            merged[name] = jax.lax.dynamic_update_slice_in_dim(
                cache[name], new, place.slot, axis=_SLOTS
            )
        else:
            merged[name] = new
    return merged


def _heads_first(array: jax.Array) -> jax.Array:
    return jnp.swapaxes(array, 1, 2)
