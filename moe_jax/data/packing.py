"""Packed batches: rows of fixed length that hold several examples of a shuffled stream each.

Here an example is a row of a data set, and a row is a row of a batch.
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
    """Batches of rows packed from a stream of example numbers.

    Within a window of examples, each example goes into the first row that has room for it, longest
    first and examples of equal length in the stream's order (first-fit decreasing: Johnson,
    Near-optimal bin packing algorithms, 1973). The window's rows are then shuffled, since later
    ones hold shorter examples. No example is lost or repeated, only moved within its window. A
    window lies within one epoch, so that every example comes once before any comes again; only a
    batch across the boundary of two epochs has examples of both. The last row of a window stays
    partly empty, so windows should not be small.

    Every batch is a function of its index alone, so a checkpoint needs only the position in the
    stream. The number of batches of an epoch is known in advance, as the learning rate's schedule
    requires. (`grain.experimental.FirstFitPackIterDataset` offers neither: it packs an iterator as
    it comes.) Finding the first row of a window takes packing all windows before it, once, in about
    ten microseconds per example. The last few windows are cached.
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
          examples: example numbers, indices into `lengths`, in shuffled order.
          lengths: tokens of every example, at most `row_length`.
          row_length: tokens of a row.
          batch_size: rows per batch.
          sort_window: approximate number of batches per window.
          epoch_examples: examples of the stream in an epoch.
          seed: seed of the order of a window's rows.
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
        # Average number of examples in `sort_window` full batches.
        tokens = sort_window * batch_size * row_length
        window_examples = max(1, tokens * len(lengths) // int(lengths.sum()))
        # Windows of nearly equal size: a small remainder would leave much of its rows empty.
        self._windows_of_epoch = -(-epoch_examples // window_examples)
        self._ends: list[int] = []  # number of rows up to the end of each window
        self._lock = threading.Lock()  # two threads make batches
        self._plan = functools.lru_cache(maxsize=8)(self._pack_window)

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size

    def __getitem__(self, index: Any) -> Any:
        """Example numbers of each row of a batch."""
        if isinstance(index, slice):
            return self.slice(index)
        rows = range(index * self._batch_size, (index + 1) * self._batch_size)
        return [self._row(row) for row in rows]

    def batches_of(self, examples: float) -> int:
        """Number of batches that hold the first `examples` examples of the stream.

        Within a window, which packs its examples in another order, rows are counted in proportion.
        """
        number = self._window_with(math.floor(examples))
        first, stop = self.window(number)
        self._find_ends(lambda: len(self._ends) > number)
        before = self._ends[number - 1] if number else 0
        share = (examples - first) / (stop - first)
        return math.ceil((before + share * (self._ends[number] - before)) / self._batch_size)

    def window(self, number: int) -> tuple[int, int]:
        """First example and end of a window."""
        epoch, index = divmod(number, self._windows_of_epoch)
        size, count = self._epoch_examples, self._windows_of_epoch
        return epoch * size + index * size // count, epoch * size + (index + 1) * size // count

    def _window_with(self, example: int) -> int:
        """Number of the window that holds the example at this position of the stream."""
        epoch, position = divmod(example, self._epoch_examples)
        within = ((position + 1) * self._windows_of_epoch - 1) // self._epoch_examples
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
        """Example numbers of each of a window's rows."""
        first, stop = self.window(number)
        examples = np.array([self._examples[index] for index in range(first, stop)])
        examples = examples[np.argsort(-self._lengths[examples], kind="stable")]
        row_numbers = first_fit(self._lengths[examples], self._row_length)
        ends = np.cumsum(np.bincount(row_numbers))
        rows = np.split(examples[np.argsort(row_numbers, kind="stable")], ends[:-1])
        order = np.random.default_rng([self._seed, number]).permutation(len(rows))
        return [rows[number] for number in order]


def first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Packs items in order, each into the first row that still has room for it, or a new one.

    Args:
      lengths: length of each item, at most `capacity`.
      capacity: capacity of a row.

    Returns:
      Row number of each item.
    """
    room = np.full(len(lengths), capacity)
    row_numbers, used = np.empty(len(lengths), np.int64), 0
    for item, length in enumerate(lengths):
        row = int(np.argmax(room[: used + 1] >= length))
        room[row] -= length
        row_numbers[item], used = row, max(used, row + 1)
    return row_numbers
