"""Where each request stands in a batch: the rows of an adapter together, on every device."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moe_jax.adapters.method import AdapterMethod, NoAdapter
from moe_jax.adapters.rows import Segment, segments_of


class BatchRows(NamedTuple):
    """The rows of a batch.

    Attributes:
      segments: of the batch; empty where all rows are the base's. Their names are places, not
        adapters, so that adapters of equal methods share what is compiled.
      adapters: which adapter each segment stands for; those of the base are left out.
      requests: of each row, the request's number; None for a row that fills up.
    """

    segments: tuple[Segment, ...]
    adapters: dict[str, str]
    requests: tuple[int | None, ...]


def arrange_rows(
    names: Sequence[str | None], methods: Mapping[str, AdapterMethod], shards: int
) -> BatchRows:
    """Sorts requests into rows.

    Args:
      names: each request's adapter; None is the base.
      methods: by adapter.
      shards: devices, or groups of them, that share the rows; each adapter gets as many rows on
        all of them.
    """
    own_methods: dict[str, AdapterMethod] = {}
    adapters: dict[str, str] = {}
    places: list[list[int | None]] = []
    for name in (*methods, None):
        numbers: list[int | None] = [i for i, other in enumerate(names) if other == name]
        if not numbers:
            continue
        numbers += [None] * (-len(numbers) % shards)
        label = f"segment{len(places)}"
        own_methods[label] = NoAdapter() if name is None else methods[name]
        if name is not None:
            adapters[label] = name
        places.append(numbers)
    rows = dict(zip(own_methods, map(len, places), strict=True))
    requests: list[int | None] = []
    for shard in range(shards):
        for numbers in places:
            size = len(numbers) // shards
            requests += numbers[shard * size : (shard + 1) * size]
    segments = segments_of(own_methods, rows, shards) if adapters else ()
    return BatchRows(segments, adapters, tuple(requests))
