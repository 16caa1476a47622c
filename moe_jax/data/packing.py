"""Rows of fixed length that hold several examples each, out of an endless shuffled stream.

An example is a row of a data set; a row here is one of a batch.
"""

import bisect
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import grain
import numpy as np


class PackedBatches(grain.MapDataset[list[np.ndarray]]):
    """Packs a stream of example numbers into rows, and cuts these into batches.

    Within a window of examples, the longest first and those of one length in the stream's order,
    each goes into the first row that has room for it (first-fit decreasing: Johnson, Near-optimal
    bin packing algorithms, 1973). The window's rows are then shuffled, since the later ones hold
    the shorter examples. No example is lost or repeated, only moved within its window, and a window
    lies within one epoch, so that no example comes again before all others have come; only a batch
    with the end of one epoch and the start of the next has examples of both. A window's last row
    stays as empty as it is, which is why windows should not be small.

    Every batch is a function of its index alone, which is what makes the position in the stream all
    there is to checkpoint, and how many batches an epoch has is known before the first of them,
    which the learning rate's schedule asks for. (`grain.experimental.FirstFitPackIterDataset`
    offers neither: it packs an iterator as it comes.) How many rows a window has is found by
    packing all windows before it, as far as is asked for: some ten microseconds an example, once.
    The last few windows are remembered.
    """

    def __init__(
        self,
        examples: grain.MapDataset[int],
        lengths: np.ndarray,
        row_length: int,
        batch_size: int,
        sort_window: int,
        epoch_examples: int,
        seed: int,
    ):
        """Wraps a stream.

        Args:
          examples: example numbers, an index into `lengths`, in shuffled order.
          lengths: tokens of every example, at most `row_length`.
          row_length: tokens of a row.
          batch_size: rows per batch.
          sort_window: about so many batches per window.
          epoch_examples: examples of the stream after which it starts over.
          seed: of the order of a window's rows.
        """
        super().__init__(examples)
        if lengths.max() > row_length:
            raise ValueError(f"an example of {lengths.max()} tokens for rows of {row_length}")
        self._examples = examples
        self._lengths = lengths
        self._row_length = row_length
        self._batch_size = batch_size
        self._epoch_examples = epoch_examples
        self._seed = seed
        # So many examples have the tokens of `sort_window` batches, on average.
        tokens = sort_window * batch_size * row_length
        most = max(1, tokens * len(lengths) // int(lengths.sum()))
        # Windows of nearly equal size: a small rest would leave much of its rows empty.
        self._windows_of_epoch = -(-epoch_examples // most)
        self._ends: list[int] = []  # rows up to the end of each window
        self._lock = threading.Lock()  # two threads make batches
        self._plan = functools.lru_cache(maxsize=8)(self._pack_window)

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size

    def __getitem__(self, index: Any) -> Any:
        """The example numbers of each row of a batch."""
        if isinstance(index, slice):
            return self.slice(index)
        rows = range(index * self._batch_size, (index + 1) * self._batch_size)
        return [self._row(row) for row in rows]

    def batches_of(self, examples: float) -> int:
        """How many batches it takes to go through the first `examples` examples of the stream.

        Within a window, whose examples are in no order, rows are counted in proportion.
        """
        number = self._window_with(math.floor(examples))
        first, stop = self.window(number)
        self._find_ends(lambda: len(self._ends) > number)
        before = self._ends[number - 1] if number else 0
        share = (examples - first) / (stop - first)
        return math.ceil((before + share * (self._ends[number] - before)) / self._batch_size)

    def window(self, number: int) -> tuple[int, int]:
        """First example and end of a window."""
        epoch, place = divmod(number, self._windows_of_epoch)
        size, count = self._epoch_examples, self._windows_of_epoch
        return epoch * size + place * size // count, epoch * size + (place + 1) * size // count

    def _window_with(self, example: int) -> int:
        """The number of the window that holds the example at this place of the stream."""
        epoch, place = divmod(example, self._epoch_examples)
        within = ((place + 1) * self._windows_of_epoch - 1) // self._epoch_examples
        return epoch * self._windows_of_epoch + within

    def _row(self, row: int) -> np.ndarray:
        self._find_ends(lambda: bool(self._ends) and self._ends[-1] > row)
        number = bisect.bisect_right(self._ends, row)
        return self._plan(number)[row - (self._ends[number - 1] if number else 0)]

    def _find_ends(self, enough: Callable[[], bool]) -> None:
        """Packs window after window until `enough()`."""
        with self._lock:
            while not enough():
                before = self._ends[-1] if self._ends else 0
                self._ends.append(before + len(self._plan(len(self._ends))))

    def _pack_window(self, number: int) -> list[np.ndarray]:
        """The example numbers of each of a window's rows."""
        first, stop = self.window(number)
        examples = np.array([self._examples[place] for place in range(first, stop)])
        examples = examples[np.argsort(-self._lengths[examples], kind="stable")]
        places = first_fit(self._lengths[examples], self._row_length)
        ends = np.cumsum(np.bincount(places))
        rows = np.split(examples[np.argsort(places, kind="stable")], ends[:-1])
        order = np.random.default_rng([self._seed, number]).permutation(len(rows))
        return [rows[place] for place in order]


def first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each item, in their order: the first that still has room for it, or a new one.

    Args:
      lengths: of the items, at most `capacity`.
      capacity: of a row.
    """
    room = np.full(len(lengths), capacity)
    places, used = np.empty(len(lengths), np.int64), 0
    for item, length in enumerate(lengths):
        place = int(np.argmax(room[: used + 1] >= length))
        room[place] -= length
        places[item], used = place, max(used, place + 1)
    return places
