"""The one form in which training text reaches the device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of tokens, padded to a common length; NumPy on the host, jax arrays on the device.

    A row is one sequence, or several where rows are packed.

    All fields have shape [B, S] (B rows of S tokens). The target of position s is the token at
    s + 1.

    Attributes:
      tokens: int32 token ids; the id at a padding position is never read.
      loss_mask: bool, true where the token *at that position* is to be predicted; false at the
        first token of a sequence behind another.
      segment_ids: int32, 0 at padding, otherwise the number of the sequence within its row, from 1.
        Tokens attend within their own segment only.
      positions: int32, the token's place within its own sequence, from 0.
      expert_groups: int32, the group of experts that the token's sequence belongs to, the same
        for all of its tokens, and 0 at padding; see `SourceConfig.expert_group`.
      labels: float32, 0 but at the last token of a row that is to be classified: there the index of
        its class or its number stands, and `loss_mask` is true.
    """

    tokens: Any
    loss_mask: Any
    segment_ids: Any
    positions: Any
    expert_groups: Any
    labels: Any


# FIXME docstring of the merged data.collate:
# """From sequences of different lengths to one batch, each in a row of its own or several in one."""


# Padding is masked everywhere, so any id of the vocabulary will do; 0 is in all of them.
PADDING_ID = 0


class Row(NamedTuple):
    """One sequence.

    Attributes:
      tokens: int32 token ids, [n].
      loss_mask: bool [n], as in `Batch`.
      expert_group: of the data set that it is from; see `SourceConfig.expert_group`.
      label: of a row that is to be classified; see `Batch.labels`.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    expert_group: int
    label: float = 0.0


def padded_length(longest: int, lengths: Sequence[int]) -> int:
    """The smallest of the ascending `lengths` that holds a row of `longest` tokens."""
    return next(length for length in lengths if length >= longest)


def doubled_lengths(shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths to pad to, each twice the one before, from `shortest` on; `longest` is the last."""
    lengths = []
    length = shortest
    while length < longest:
        lengths.append(length)
        length *= 2
    return (*lengths, longest)


def pad_rows(rows: Sequence[Row], batch_size: int, lengths: Sequence[int]) -> Batch:
    """A batch [batch_size, S] of at most that many rows; S is one of `lengths`.

    Args:
      rows: at least one.
      batch_size: rows of the batch; those beyond `rows` are empty (segment 0, no target).
      lengths: the padded lengths that may occur, ascending.
    """
    width = padded_length(max(len(tokens) for tokens, *_ in rows), lengths)
    batch = _padding((batch_size, width))
    for number, row in enumerate(rows):
        _write(batch, number, 0, 1, row)
    return batch


def pack_rows(rows: Sequence[Sequence[Row]], length: int) -> Batch:
    """A batch [len(rows), length] whose rows hold several sequences each, one behind the other.

    A sequence's first token is not predicted, as what stands before it is another sequence.

    Args:
      rows: the sequences of each row of the batch, of at most `length` tokens together.
      length: tokens of a row.
    """
    batch = _padding((len(rows), length))
    for number, sequences in enumerate(rows):
        start = 0
        for segment, row in enumerate(sequences, start=1):
            _write(batch, number, start, segment, row)
            batch.loss_mask[number, start] = False
            start += len(row.tokens)
    return batch


def _padding(shape: tuple[int, int]) -> Batch:
    return Batch(
        tokens=np.full(shape, PADDING_ID, np.int32),
        loss_mask=np.zeros(shape, bool),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        expert_groups=np.zeros(shape, np.int32),
        labels=np.zeros(shape, np.float32),
    )


def _write(batch: Batch, number: int, start: int, segment: int, row: Row) -> None:
    """Puts a sequence into row `number` of a batch, from place `start` on."""
    stop = start + len(row.tokens)
    place = (number, slice(start, stop))
    batch.tokens[place] = row.tokens
    batch.loss_mask[place] = row.loss_mask
    batch.segment_ids[place] = segment
    batch.positions[place] = np.arange(stop - start)
    batch.expert_groups[place] = row.expert_group
    batch.labels[number, stop - 1] = row.label
