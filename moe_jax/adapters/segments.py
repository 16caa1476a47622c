"""Which rows of a batch belong to which adapter.

Rows of several adapters share one batch: the frozen projections run once on all rows, and each
adapter changes its own rows only. The division is static, so that it costs slices and nothing else.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod


class Segment(NamedTuple):
    """Rows `start` to `stop` (exclusive) of every batch belong to the adapter `name`."""

    name: str
    method: AdapterMethod
    start: int
    stop: int


def segments_of(methods: dict[str, AdapterMethod], rows: dict[str, int]) -> tuple[Segment, ...]:
    """Segments for adapters that take `rows[name]` rows each, in the order of `methods`."""
    segments, start = [], 0
    for name, method in methods.items():
        segments.append(Segment(name, method, start, start + rows[name]))
        start += rows[name]
    return tuple(segments)


def update_rows(
    segment: Segment, array: jax.Array, update: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`array` with `update` applied to the segment's rows."""
    if segment.start == 0 and segment.stop == array.shape[0]:
        return update(array)
    rows = update(array[segment.start : segment.stop])
    return jnp.concatenate([array[: segment.start], rows, array[segment.stop :]])
