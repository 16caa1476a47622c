"""The rows of a batch that belong to each adapter.

Several adapters share a batch: the frozen projections run once on all rows, and each adapter
changes its own rows. The division is static, so that it costs slices and nothing else.

Where devices share the rows of a batch, each device holds rows of every adapter: the batch is a
number of equal shards, one after the other, and an adapter has the same range of rows in each of
them. Taking its rows therefore moves nothing between devices.

Where the division changes from call to call, an adapter has a window instead; see
`moe_jax.adapters.row_window`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.row_window import RowWindow, replace_window, take_window
from moe_jax.layers.names import MODULE_PREFIX


class AdapterRows(NamedTuple):
    """The range of rows of every shard that belongs to one adapter.

    Attributes:
      name: name of the adapter.
      method: method of the adapter.
      start, stop: first row in each shard, and the row after the last.
      shards: number of equal shards that the rows of a batch are divided into.
    """

    name: str
    method: AdapterMethod
    start: int
    stop: int
    shards: int = 1

    @property
    def module_name(self) -> str:
        """Name of the adapter's Linen module at every site."""
        return MODULE_PREFIX + self.name

    @property
    def total(self) -> int:
        """Number of the adapter's rows in the whole batch."""
        return (self.stop - self.start) * self.shards


Windows = Mapping[str, RowWindow]
"""Windows of all adapters of a batch, by name."""


def window_of(rows: AdapterRows, windows: Windows | None) -> RowWindow | None:
    """Window of an adapter; None where the division is static."""
    return None if windows is None else windows[rows.name]


def divide_rows(
    methods: Mapping[str, AdapterMethod], counts: Mapping[str, int], shards: int = 1
) -> tuple[AdapterRows, ...]:
    """Gives each adapter `counts[name]` rows of a batch, in the order of `methods`.

    Args:
      methods: method of each adapter.
      counts: number of rows of each adapter in the whole batch; multiples of `shards`.
      shards: number of devices, or groups of them, that the rows are divided over.

    Raises:
      ValueError: the rows of an adapter do not divide.
    """
    ranges, start = [], 0
    for name, method in methods.items():
        count, rest = divmod(counts[name], shards)
        if rest:
            raise ValueError(f"{counts[name]} rows of {name!r} do not divide into {shards} shards")
        ranges.append(AdapterRows(name, method, start, start + count, shards))
        start += count
    return tuple(ranges)


def take_rows(rows: AdapterRows, array: jax.Array, window: RowWindow | None = None) -> jax.Array:
    """The adapter's rows of `array` [B, ...], shard after shard; or those of its window."""
    if window is not None:
        return take_window(window, array)
    sharded = array.reshape(rows.shards, -1, *array.shape[1:])
    if (rows.start, rows.stop) == (0, sharded.shape[1]):
        return array
    return sharded[:, rows.start : rows.stop].reshape(rows.total, *array.shape[1:])


def take_rows_of_adapters(adapter_rows: Sequence[AdapterRows], array: jax.Array) -> jax.Array:
    """Concatenates the rows of several adapters of `array` [B, ...], shard by shard."""
    parts = [
        take_rows(rows, array).reshape(rows.shards, -1, *array.shape[1:]) for rows in adapter_rows
    ]
    joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return joined.reshape(-1, *array.shape[1:])


def replace_rows(
    adapter_rows: Sequence[AdapterRows],
    array: jax.Array,
    new: Mapping[str, jax.Array],
    windows: Windows | None = None,
) -> jax.Array:
    """`array` [B, ...] with the rows of each adapter in `new` replaced.

    Args:
      adapter_rows: rows of all adapters of the batch, which they fill.
      array: an array of the batch.
      new: new rows of an adapter, as `take_rows` orders them, by name; the others' rows stay.
      windows: windows of all adapters; None where the division is static.
    """
    if not new:
        return array
    if windows is not None:
        for name, part in new.items():
            array = replace_window(windows[name], array, part)
        return array
    parts = []
    for rows in adapter_rows:
        part = new[rows.name] if rows.name in new else take_rows(rows, array)
        parts.append(part.reshape(rows.shards, -1, *part.shape[1:]))
    joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return joined.reshape(array.shape[0], *joined.shape[2:])
