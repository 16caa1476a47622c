"""Which rows of a batch belong to which adapter.

Rows of several adapters share one batch: the frozen projections run once on all rows, and each
adapter changes its own rows only. The division is static, so that it costs slices and nothing else.

Where devices share the rows of a batch, each of them has rows of every adapter: a batch is a number
of equal shards, one after the other, and an adapter has the same places in each of them. So taking
its rows moves nothing between devices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod


class Segment(NamedTuple):
    """Rows `start` to `stop` (exclusive) of every shard belong to the adapter `name`.

    Attributes:
      name: of the adapter.
      method: of the adapter.
      start, stop: places in each shard.
      shards: into how many equal shards the rows of a batch are divided.
    """

    name: str
    method: AdapterMethod
    start: int
    stop: int
    shards: int = 1

    @property
    def rows(self) -> int:
        """The adapter's rows in a batch."""
        return (self.stop - self.start) * self.shards


def segments_of(
    methods: Mapping[str, AdapterMethod], rows: Mapping[str, int], shards: int = 1
) -> tuple[Segment, ...]:
    """Segments for adapters that take `rows[name]` rows of a batch each, in the order of `methods`.

    Args:
      methods: by adapter.
      rows: of a whole batch, by adapter; multiples of `shards`.
      shards: over how many devices, or groups of them, rows are divided.

    Raises:
      ValueError: an adapter's rows do not divide.
    """
    segments, start = [], 0
    for name, method in methods.items():
        count, rest = divmod(rows[name], shards)
        if rest:
            raise ValueError(f"{rows[name]} rows of {name!r} do not divide into {shards} shards")
        segments.append(Segment(name, method, start, start + count, shards))
        start += count
    return tuple(segments)


def take_rows(segment: Segment, array: jax.Array) -> jax.Array:
    """The segment's rows of `array` [B, ...], shard after shard."""
    sharded = array.reshape(segment.shards, -1, *array.shape[1:])
    if (segment.start, segment.stop) == (0, sharded.shape[1]):
        return array
    return sharded[:, segment.start : segment.stop].reshape(segment.rows, *array.shape[1:])


def take_rows_of(segments: Sequence[Segment], array: jax.Array) -> jax.Array:
    """The rows of several segments of `array` [B, ...], as a batch of those adapters has them."""
    parts = [
        take_rows(segment, array).reshape(segment.shards, -1, *array.shape[1:])
        for segment in segments
    ]
    joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return joined.reshape(-1, *array.shape[1:])


def update_rows(
    segments: Sequence[Segment],
    array: jax.Array,
    updates: Mapping[str, Callable[[jax.Array], jax.Array]],
) -> jax.Array:
    """`array` [B, ...] with the rows of each adapter in `updates` put through its function.

    Args:
      segments: of the whole batch.
      array: rows in the order of the segments.
      updates: by adapter; rows of the others stay as they are.
    """
    if not updates:
        return array
    parts = []
    for segment in segments:
        rows = take_rows(segment, array)
        rows = updates[segment.name](rows) if segment.name in updates else rows
        parts.append(rows.reshape(segment.shards, -1, *rows.shape[1:]))
    joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return joined.reshape(array.shape[0], *joined.shape[2:])
