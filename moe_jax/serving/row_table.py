"""The rows that the engine computes, and the blocks of the cache that each of them owns."""

import math
from collections.abc import Sequence

import numpy as np

from moe_jax.layers.block_cache import SPARE_BLOCK
from moe_jax.serving.answer import OngoingAnswer


class Row:
    """An answer that is computed.

    Attributes:
      answer: the answer.
      slot: index of the row in the engine's rows.
      blocks: its blocks of the cache, in the order of its positions.
      cached: number of its tokens that are in the cache.
      chosen: number of the answer's tokens that were chosen in this row; fewer than the answer has
        while they are computed again, after an earlier row of the answer was taken away.
    """

    def __init__(self, answer: OngoingAnswer, slot: int, blocks: Sequence[int]):
        self.answer = answer
        self.slot = slot
        self.blocks = list(blocks)
        self.cached = 0
        self.chosen = 0

    @property
    def is_prefilled(self) -> bool:
        """True if the whole prompt is in the cache."""
        return self.cached >= len(self.answer.request.tokens)

    @property
    def goes_on(self) -> bool:
        """True if the answer has room for a further token after the one that is being computed.

        It may still end before, by a stop string or an end token. False while tokens are computed
        again.
        """
        answer = self.answer
        has_left = self.chosen == len(answer.generated) < answer.request.max_tokens - 1
        return has_left and not answer.is_ended and not answer.is_cancelled


class RowTable:
    """Rows in use, with a fixed number of slots and of blocks.

    A row owns the blocks of its prompt and of its tokens so far, and grows by a block at a time.

    Attributes:
      rows: rows in use, the oldest first.
      block: positions of a block.
    """

    def __init__(self, num_rows: int, num_blocks: int, block: int, max_length: int, group: int):
        """Starts without rows.

        Args:
          num_rows: number of slots.
          num_blocks: number of blocks, besides the spare one.
          block: positions of a block.
          max_length: largest number of tokens of a row.
          group: number of blocks that attention reads at once.
        """
        self.rows: list[Row] = []
        self.block = block
        self._shape = (-(-max_length // (block * group)), group)
        self._num_slots = num_rows
        self._num_blocks = num_blocks
        self._free_slots = list(range(num_rows))[::-1]
        self._free_blocks = [b for b in range(num_blocks + 1) if b != SPARE_BLOCK][::-1]

    @property
    def blocks_in_use(self) -> int:
        """Number of blocks that rows own."""
        return self._num_blocks - len(self._free_blocks)

    def add(self, answer: OngoingAnswer) -> Row | None:
        """Gives an answer a row; None if there is none free, or too few blocks."""
        request = answer.request
        length = min(request.total_length, len(request.tokens) + len(answer.generated) + 1)
        needed = -(-length // self.block)
        if not self._free_slots or needed > len(self._free_blocks):
            return None
        blocks = [self._free_blocks.pop() for _ in range(needed)]
        row = Row(answer, self._free_slots.pop(), blocks)
        self.rows.append(row)
        return row

    def has_room(self, row: Row) -> bool:
        """True if the row's next token has a place in its blocks."""
        return row.cached < len(row.blocks) * self.block

    def grow(self, row: Row) -> bool:
        """Gives a row a further block; False if none is free."""
        if self._free_blocks:
            row.blocks.append(self._free_blocks.pop())
            return True
        return False

    def remove(self, row: Row) -> None:
        """Frees a row's slot and blocks."""
        self.rows.remove(row)
        self._free_slots.append(row.slot)
        self._free_blocks += row.blocks

    def slots(self, rows: Sequence[Row], size: int) -> np.ndarray:
        """Slots of rows, int32 [size], padded with the number of slots."""
        padding = [self._num_slots] * (size - len(rows))
        return np.array([*(row.slot for row in rows), *padding], np.int32)

    def tables(self, rows: Sequence[Row], size: int) -> np.ndarray:
        """Tables of rows, int32 [size, N, n], padded with the spare block; see `BlockPosition`."""
        tables = np.full((size, math.prod(self._shape)), SPARE_BLOCK, np.int32)
        for index, row in enumerate(rows):
            tables[index, : len(row.blocks)] = row.blocks
        return tables.reshape(size, *self._shape)
