"""Batches of token sequences for training.

A padded row holds one sequence. A packed row holds several, one behind another.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Padding is masked everywhere, so any id serves; 0 is in every vocabulary.
PADDING_ID = 0


class Batch(NamedTuple):
    """Rows of tokens, padded to a common length; NumPy on the host, jax arrays on the device.

    All fields have shape [B, S] (B rows of S tokens). The target of position s is the token at
    s + 1.

    Attributes:
      tokens: int32 token ids; the id at a padding position is never read.
      loss_mask: bool, true where the token *at that position* is a target; false at the first token
        of every sequence but the first of a row.
      segment_ids: int32, number of the sequence within its row, from 1; 0 at padding. Tokens attend
        within their own segment only.
      positions: int32, position of the token within its sequence, from 0.
      expert_groups: int32, group of experts of the token's sequence, equal for all of its tokens;
        0 at padding. See `SourceConfig.expert_group`.
      labels: float32, class index or number at the last token of a row to classify, where
        `loss_mask` is true, and 1 at the last token of a desirable answer of `feedback` data;
        0 elsewhere.
      reference_log_probs: float32, log-probability of the row's answer under a reference model, at
        the row's last token; 0 elsewhere, and where none was computed.
    """

    tokens: Any
    loss_mask: Any
    segment_ids: Any
    positions: Any
    expert_groups: Any
    labels: Any
    reference_log_probs: Any


class TokenSequence(NamedTuple):
    """One sequence before it is padded or packed.

    Attributes:
      tokens: int32 token ids, [n].
      loss_mask: bool [n], as in `Batch`.
      expert_group: group of experts of the sequence's data set; see `SourceConfig.expert_group`.
      label: class index or number of the sequence, or label of the answer; see `Batch.labels`.
      reference_log_prob: see `Batch.reference_log_probs`.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    expert_group: int
    label: float = 0.0
    reference_log_prob: float = 0.0


def padded_length(longest: int, lengths: Sequence[int]) -> int:
    """Smallest of the ascending `lengths` that holds a row of `longest` tokens."""
    return next(length for length in lengths if length >= longest)


def doubled_lengths(shortest: int, longest: int) -> tuple[int, ...]:
    """Padded lengths `shortest`, 2 `shortest`, 4 `shortest`, ...; the last one is `longest`."""
    lengths = []
    length = shortest
    while length < longest:
        lengths.append(length)
        length *= 2
    return (*lengths, longest)


def pad_rows(rows: Sequence[TokenSequence], batch_size: int, lengths: Sequence[int]) -> Batch:
    """Pads up to `batch_size` sequences to a batch [batch_size, S]; S is one of `lengths`.

    Args:
      rows: at least one sequence.
      batch_size: rows of the batch; those beyond `rows` are empty (segment 0, no target).
      lengths: allowed padded lengths, ascending.
    """
    width = padded_length(max(len(tokens) for tokens, *_ in rows), lengths)
    batch = _padding((batch_size, width))
    for number, row in enumerate(rows):
        _write(batch, number, 0, 1, row)
    return batch


def pack_rows(rows: Sequence[Sequence[TokenSequence]], length: int) -> Batch:
    """Packs sequences one behind another into a batch [len(rows), length].

    The first token of a sequence is no target, since it follows another sequence.

    Args:
      rows: sequences of each row, of at most `length` tokens together.
      length: tokens of a row.
    """
    batch = _padding((len(rows), length))
    for number, sequences in enumerate(rows):
        start = 0
        for segment, sequence in enumerate(sequences, start=1):
            _write(batch, number, start, segment, sequence)
            batch.loss_mask[number, start] = False
            start += len(sequence.tokens)
    return batch


def _padding(shape: tuple[int, int]) -> Batch:
    return Batch(
        tokens=np.full(shape, PADDING_ID, np.int32),
        loss_mask=np.zeros(shape, bool),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        expert_groups=np.zeros(shape, np.int32),
        labels=np.zeros(shape, np.float32),
        reference_log_probs=np.zeros(shape, np.float32),
    )


def _write(batch: Batch, number: int, start: int, segment: int, sequence: TokenSequence) -> None:
    """Writes a sequence into row `number` of a batch, from position `start`."""
    stop = start + len(sequence.tokens)
    span = (number, slice(start, stop))
    batch.tokens[span] = sequence.tokens
    batch.loss_mask[span] = sequence.loss_mask
    batch.segment_ids[span] = segment
    batch.positions[span] = np.arange(stop - start)
    batch.expert_groups[span] = sequence.expert_group
    batch.labels[number, stop - 1] = sequence.label
    batch.reference_log_probs[number, stop - 1] = sequence.reference_log_prob
