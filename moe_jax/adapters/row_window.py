"""The rows of one adapter in a batch that changes from call to call.

A server's batch has other adapters at every token. A static division (`moe_jax.adapters.rows`)
would need a program for each. Here an adapter has a range of fixed size, whose start is an array,
and a mask of its own rows in it. Programs then depend on the number of adapters and the size alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class RowWindow(NamedTuple):
    """A range of b rows of a batch that holds rows of one adapter, besides others.

    Windows may overlap. The adapter computes all rows of its window, and those of the mask are
    used.

    Attributes:
      first: int32 [], first row of the window.
      mask: bool [b], the rows of the window that belong to the adapter.
    """

    first: Any
    mask: Any


def take_window(window: RowWindow, array: jax.Array, axis: int = 0) -> jax.Array:
    """The rows of the window: [B, ...] to [b, ...], where `axis` is that of the rows."""
    size = window.mask.shape[0]
    if size == array.shape[axis]:
        return array
    return jax.lax.dynamic_slice_in_dim(array, window.first, size, axis)


def replace_window(window: RowWindow, array: jax.Array, new: jax.Array, axis: int = 0) -> jax.Array:
    """`array` [B, ...] with the adapter's rows replaced by those of `new` [b, ...]."""
    mask = jnp.expand_dims(window.mask, [i for i in range(new.ndim) if i != axis])
    replaced = jnp.where(mask, new, take_window(window, array, axis))
    if new.shape == array.shape:
        return replaced
    return jax.lax.dynamic_update_slice_in_dim(array, replaced, window.first, axis)
