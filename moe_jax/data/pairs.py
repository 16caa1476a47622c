"""Encoded rows of preference data: pairs, kept or left out together, and labels of feedback."""

from collections.abc import Iterator
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from moe_jax.errors import DataError

_BATCH_PAIRS = 500
"""Pairs of a table that are read into memory at once."""


class Parts(NamedTuple):
    """Parts of encoded rows that fit into `max_length` tokens.

    Attributes:
      rows: index of each part's row, ascending.
      starts: its first token in the row.
      lengths: its number of tokens.
      truncated: whether tokens of the row are in no part.
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray


class PairedParts(NamedTuple):
    """Parts of the rows of pairs.

    Attributes:
      parts: parts of all rows, with length 0 where the pair is left out.
      pairs: a part for each pair, at its first row, with the tokens of both.
      equal: index of the first row of each pair whose answers are equal where they are cut.
      answer_tokens: mean number of tokens of the chosen and of the rejected answers that are kept.
    """

    parts: Parts
    pairs: Parts
    equal: list[int]
    answer_tokens: tuple[float, float]


def pair_parts(table: datasets.Dataset, parts: Parts) -> PairedParts:
    """Leaves out the pairs of which an answer has no target, or whose answers are equal.

    Args:
      table: encoded rows in Arrow's format, those of a pair one after the other.
      parts: a part of each row; length 0 where it has no target.
    """
    lengths = parts.lengths.reshape(-1, 2)
    kept, equal = (lengths > 0).all(axis=1), np.zeros(len(lengths), bool)
    targets = np.zeros(lengths.shape)
    for pair, both in enumerate(_pairs(table)):
        cut = [
            (ids[:length], mask[:length])
            for (ids, mask), length in zip(both, lengths[pair], strict=True)
        ]
        equal[pair] = np.array_equal(cut[0][0], cut[1][0])
        targets[pair] = [mask.sum() for _, mask in cut]
    equal &= kept
    kept &= ~equal
    both = np.repeat(kept, 2)
    answers = targets[kept].mean(axis=0) if kept.any() else np.zeros(2)
    return PairedParts(
        parts=parts._replace(lengths=np.where(both, parts.lengths, 0)),
        pairs=Parts(
            parts.rows[::2],
            parts.starts[::2],
            np.where(kept, lengths.sum(axis=1), 0),
            np.any(parts.truncated.reshape(-1, 2), axis=1),
        ),
        equal=(2 * np.flatnonzero(equal)).tolist(),
        answer_tokens=(float(answers[0]), float(answers[1])),
    )


def count_labels(labels: np.ndarray, title: str) -> str:
    """Line on the desirable (1) and undesirable (0) answers of a data set of feedback.

    Raises:
      DataError: there are none of one kind.
    """
    desirable = int(labels.sum())
    counts = {"desirable": desirable, "undesirable": len(labels) - desirable}
    for kind, count in counts.items():
        if not count:
            raise DataError(
                f"{title}: no {kind} answers among {len(labels)}, and 'kto' needs both labels; add "
                "rows of the other label"
            )
    return f", {desirable} desirable and {counts['undesirable']} undesirable answers"


def _pairs(table: datasets.Dataset) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yields the ids and targets of the two rows of each pair."""
    for start in range(0, len(table), 2 * _BATCH_PAIRS):
        batch = table[start : start + 2 * _BATCH_PAIRS]
        rows = list(zip(split_lists(batch["tokens"]), split_lists(batch["is_target"]), strict=True))
        for first in range(0, len(rows), 2):
            yield rows[first : first + 2]


def split_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column, each as an array."""
    return np.split(flat_values(column), np.cumsum(list_lengths(column))[:-1])


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """Values of a column of lists, concatenated in one array."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Lengths of the lists of a column."""
    return column.combine_chunks().value_lengths().to_numpy()
