"""Shuffled row numbers without end, and batches of rows of similar length made from them."""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np


class ShuffledRange(grain.MapDataset[int]):
    """Endless stream over a range of numbers: every epoch has each number once, in another order.

    Equivalent to Grain's `range(...).shuffle(seed).repeat()`, which takes milliseconds for every
    row of a small range, because its index shuffle walks through a domain of at least 2^16 numbers.
    """

    def __init__(self, start: int, stop: int, seed: Sequence[int]):
        """Creates a stream.

        Args:
          start: first number.
          stop: one past the last number, above `start`.
          seed: non-negative integers; equal seeds give equal orders.
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
        epoch, position = divmod(index, self._size)
        return self._start + int(self._order(epoch)[position])

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        numbers = np.arange(self._size, dtype=np.uint32)
        return np.random.default_rng([*self._seed_words, epoch]).permutation(numbers)


class LengthGroupedBatches(grain.MapDataset[np.ndarray]):
    """Batches of row numbers whose rows have similar length.

    Within a window of batches the rows are sorted by length and cut into batches. Every position of
    the stream has a fixed pseudo-random number, and the position with the k-th smallest number of
    its window gets the batch of the k-th shortest rows. So the order is random, and streams of the
    same seed have short rows at the same positions and long ones at the same positions, however
    many rows each has: side by side and padded to the longest they waste little. No row is lost or
    repeated, only moved within its window. A window lies within one epoch, so that every row comes
    once before any comes again; only a batch across the boundary of two epochs has rows of both.

    Every batch is a function of its index alone, so a checkpoint needs only the position in the
    stream. The last few windows are cached, since each is needed once per batch.
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
          rows: row numbers, indices into `lengths`, in shuffled order.
          lengths: tokens of every row.
          batch_size: rows per batch.
          sort_window: largest number of batches per window.
          epoch_rows: rows of the stream in an epoch.
          seed: seed of the positions' numbers.
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
        """Number of batches that hold the first `rows` rows of the stream."""
        return math.ceil(rows / self._batch_size)

    def window(self, index: int) -> tuple[int, int]:
        """First batch and end of the window that contains batch `index`."""
        epoch = index * self._batch_size // self._epoch_rows
        first = -(-epoch * self._epoch_rows // self._batch_size)
        stop = (epoch + 1) * self._epoch_rows // self._batch_size
        if not first <= index < stop:
            return index, index + 1
        # Windows of nearly equal size: a small remainder would have little to sort.
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
        return batches[np.argsort(np.argsort(position_numbers(self._seed, first, stop)))]


_BLOCK = 1024
"""Positions whose numbers are drawn at once."""


def position_numbers(seed: int, first: int, stop: int) -> np.ndarray:
    """Pseudo-random numbers in [0, 1) of the positions `first` to `stop` of the stream.

    Each is a function of the seed and the position alone.
    """
    start = first // _BLOCK
    blocks = [
        np.random.default_rng([seed, b]).random(_BLOCK) for b in range(start, stop // _BLOCK + 1)
    ]
    return np.concatenate(blocks)[first - start * _BLOCK : stop - start * _BLOCK]
