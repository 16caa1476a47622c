"""Row numbers in random order, shuffled anew every epoch."""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np


class ShuffledRange(grain.MapDataset[int]):
    """The numbers of a range without end: every epoch has each of them once, in its own order.

    Does what Grain's `range(...).shuffle(seed).repeat()` does, which takes milliseconds for every
    row of a small range: its index shuffle walks through a domain of at least 2^16 numbers.
    """

    def __init__(self, start: int, stop: int, seed: Sequence[int]):
        """Wraps nothing.

        Args:
          start: the first number.
          stop: one past the last number, above `start`.
          seed: any integers that are not negative; equal seeds give equal orders.
        """
        super().__init__()
        self._start = start
        self._size = stop - start
        self._seed_words = tuple(seed)
        # Two epochs meet in a batch, and two threads make batches.
        self._order = functools.lru_cache(maxsize=4)(self._order_of_epoch)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._size)
        return self._start + int(self._order(epoch)[place])

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        numbers = np.arange(self._size, dtype=np.uint32)
        return np.random.default_rng([*self._seed_words, epoch]).permutation(numbers)


# FIXME docstring of the merged data.grouping:
# """Batches of rows of like length, out of an endless shuffled stream of rows."""


class LengthGroupedBatches(grain.MapDataset[np.ndarray]):
    """Cuts a stream of row numbers into batches whose rows have like length.

    Within a window of batches the rows are sorted by length and cut into batches, which then take
    the places that their ranks say: every place in the stream has a fixed pseudo-random number, and
    the place with the k-th smallest number of its window gets the batch of the k-th shortest rows.
    So the order is random, and streams of the same seed have short rows at the same places and long
    ones at the same places, however many rows each has: side by side and padded to the longest they
    waste little. No row is lost or repeated, only moved within its window. A window lies within one
    epoch, so that no row comes again before all others have come; only a batch with the end of one
    epoch and the start of the next has rows of both.

    Every batch is a function of its index alone, which is what makes the position in the stream all
    there is to checkpoint. The last few windows are remembered, as a window is asked for once per
    batch.
    """

    def __init__(
        self,
        rows: grain.MapDataset[int],
        lengths: np.ndarray,
        batch_size: int,
        sort_window: int,
        epoch_rows: int,
        seed: int,
    ):
        """Wraps a stream.

        Args:
          rows: row numbers, an index into `lengths`, in shuffled order.
          lengths: tokens of every row.
          batch_size: rows per batch.
          sort_window: batches per window, at most.
          epoch_rows: rows of the stream after which it starts over.
          seed: of the places' numbers.
        """
        super().__init__(rows)
        self._rows = rows
        self._lengths = lengths
        self._batch_size = batch_size
        self._sort_window = sort_window
        self._epoch_rows = epoch_rows
        self._seed = seed
        self._plan = functools.lru_cache(maxsize=8)(self._plan_window)

    def __len__(self) -> int:
        return len(self._rows) // self._batch_size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        first, stop = self.window(index)
        return self._plan(first, stop)[index - first]

    def batches_of(self, rows: float) -> int:
        """How many batches it takes to go through the first `rows` rows of the stream."""
        return math.ceil(rows / self._batch_size)

    def window(self, index: int) -> tuple[int, int]:
        """First batch and end of the window that batch `index` belongs to."""
        epoch = index * self._batch_size // self._epoch_rows
        first = -(-epoch * self._epoch_rows // self._batch_size)
        stop = (epoch + 1) * self._epoch_rows // self._batch_size
        if not first <= index < stop:
            return index, index + 1
        # Windows of nearly equal size: a small rest would have little to sort.
        count = -(-(stop - first) // self._sort_window)
        number = ((index - first + 1) * count - 1) // (stop - first)
        return (
            first + number * (stop - first) // count,
            first + (number + 1) * (stop - first) // count,
        )

    def _plan_window(self, first: int, stop: int) -> np.ndarray:
        """Row numbers [stop - first, batch_size] of a window's batches."""
        indices = range(first * self._batch_size, stop * self._batch_size)
        rows = np.array([self._rows[index] for index in indices])
        if stop - first > 1:
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
        batches = rows.reshape(stop - first, self._batch_size)
        return batches[np.argsort(np.argsort(place_numbers(self._seed, first, stop)))]


_BLOCK = 1024
"""Places whose numbers are drawn at once."""


def place_numbers(seed: int, first: int, stop: int) -> np.ndarray:
    """The pseudo-random numbers in [0, 1) of the places `first` to `stop` in the stream.

    Each is a function of the seed and of its place alone.
    """
    start = first // _BLOCK
    blocks = [
        np.random.default_rng([seed, b]).random(_BLOCK) for b in range(start, stop // _BLOCK + 1)
    ]
    return np.concatenate(blocks)[first - start * _BLOCK : stop - start * _BLOCK]
