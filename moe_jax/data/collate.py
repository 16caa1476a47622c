"""From rows of different lengths to one padded batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data.batch import Batch

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
    shape = (batch_size, width)
    batch = Batch(
        tokens=np.full(shape, PADDING_ID, np.int32),
        loss_mask=np.zeros(shape, bool),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        expert_groups=np.zeros(shape, np.int32),
        labels=np.zeros(shape, np.float32),
    )
    for number, (tokens, loss_mask, expert_group, label) in enumerate(rows):
        length = len(tokens)
        batch.tokens[number, :length] = tokens
        batch.loss_mask[number, :length] = loss_mask
        batch.segment_ids[number, :length] = 1
        batch.positions[number, :length] = np.arange(length)
        batch.expert_groups[number, :length] = expert_group
        batch.labels[number, length - 1] = label
    return batch
