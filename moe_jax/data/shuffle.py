"""Row numbers in random order, shuffled anew every epoch."""

import functools
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
