"""Examples of a data set: what a batch holds whole, one row or two side by side.

Most examples are one sequence. An example of the schema `preference` is two, the chosen answer and
the rejected one. An example of `feedback` is an answer, and after the same prompt an answer to
another prompt, that of the nearest example before it, for the estimate of KL (see `KtoConfig`).
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.config.preference import ROWS_PER_EXAMPLE
from moe_jax.data.batch import TokenSequence
from moe_jax.data.tokenized_source import TokenizedSource
from moe_jax.errors import DataError

_READ_AT_ONCE = 1000


class Examples:
    """Examples of one data set, numbered from 0.

    Attributes:
      source: data set.
      rows_per_example: rows of a batch for each example.
      lengths: tokens of the longest row of each example.
      mean_lengths: mean number of tokens of the rows of each example.
    """

    def __init__(self, source: TokenizedSource, max_length: int):
        """Reads the lengths.

        Args:
          source: tokenized data set.
          max_length: largest number of tokens of a row.

        Raises:
          DataError: all answers of `feedback` are to one prompt.
        """
        self.source = source
        self._max_length = max_length
        self._log_probs: np.ndarray | None = None
        self.rows_per_example = 1
        lengths = source.lengths[:, None]
        if source.schema == "preference":
            self.rows_per_example = ROWS_PER_EXAMPLE
            lengths = source.lengths.reshape(-1, ROWS_PER_EXAMPLE)
        elif source.schema == "feedback":
            self.rows_per_example = ROWS_PER_EXAMPLE
            prompts = [
                sequence.tokens[: _answer_start(sequence)]
                for start in range(0, len(lengths), _READ_AT_ONCE)
                for sequence in source.sequences(np.arange(len(lengths))[start:][:_READ_AT_ONCE])
            ]
            self._others = _nearest_with_another_prompt(prompts)
            starts = np.array([len(prompt) for prompt in prompts])
            mismatched = starts + (source.lengths - starts)[self._others]
            lengths = np.stack([source.lengths, np.minimum(mismatched, max_length)], axis=1)
        self.lengths, self.mean_lengths = lengths.max(axis=1), lengths.mean(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def set_reference_log_probs(self, log_probs: np.ndarray) -> None:
        """Sets what `rows` gives as the log-probabilities of a reference, [examples, rows]."""
        assert log_probs.shape == (len(self), self.rows_per_example)
        self._log_probs = log_probs

    def rows(self, numbers: np.ndarray) -> list[TokenSequence]:
        """Rows of the examples of these numbers, in their order."""
        source, size = self.source, self.rows_per_example
        if source.schema == "feedback":
            others = source.sequences(self._others[numbers])
            rows = [
                row
                for own, other in zip(source.sequences(numbers), others, strict=True)
                for row in (own, _with_answer(own, other, self._max_length))
            ]
        else:
            rows = source.sequences((size * numbers[:, None] + np.arange(size)).reshape(-1))
        if self._log_probs is None:
            return rows
        log_probs = self._log_probs[numbers].reshape(-1).tolist()
        return [
            row._replace(reference_log_prob=value)
            for row, value in zip(rows, log_probs, strict=True)
        ]


class ExampleStore:
    """Examples of several data sets, numbered consecutively, set after set.

    Attributes:
      parts: examples of each data set.
      lengths: tokens of the longest row of every example.
      mean_lengths: mean number of tokens of the rows of every example.
      rows_per_example: rows of a batch for each example.
    """

    def __init__(self, parts: Sequence[Examples]):
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.mean_lengths = np.concatenate([part.mean_lengths for part in parts])
        self.rows_per_example = parts[0].rows_per_example

    def fetch(self, examples: np.ndarray) -> list[TokenSequence]:
        """Rows of the examples of these numbers, in their order."""
        size = self.rows_per_example
        out: list[TokenSequence | None] = [None] * (size * len(examples))
        owners = np.searchsorted(self._starts, examples, side="right") - 1
        for number in np.unique(owners):
            indices = np.flatnonzero(owners == number)
            sequences = self.parts[number].rows(examples[indices] - self._starts[number])
            places = (size * indices[:, None] + np.arange(size)).reshape(-1)
            for place, sequence in zip(places, sequences, strict=True):
                out[place] = sequence
        return [row for row in out if row is not None]


def _answer_start(sequence: TokenSequence) -> int:
    """Position of the first target."""
    return int(np.argmax(sequence.loss_mask))


def _nearest_with_another_prompt(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Number of the nearest example before each that has another prompt; the last precedes 0.

    Raises:
      DataError: all prompts are equal.
    """
    ids = [prompt.tobytes() for prompt in prompts]
    if len(set(ids)) == 1:
        raise DataError(
            "all answers are to the same prompt, and 'kto' compares with answers to other prompts; "
            "add rows with another prompt"
        )
    found = next(n for n in range(-1, -len(ids), -1) if ids[n] != ids[0])
    others = []
    for number, own in enumerate(ids):
        found = number - 1 if ids[number - 1] != own else found
        others.append(found % len(ids))
    return np.array(others)


def _with_answer(own: TokenSequence, other: TokenSequence, max_length: int) -> TokenSequence:
    """The prompt of one sequence with the answer of another, at most `max_length` tokens."""
    prompt, answer = _answer_start(own), _answer_start(other)
    return own._replace(
        tokens=np.concatenate([own.tokens[:prompt], other.tokens[answer:]])[:max_length],
        loss_mask=np.concatenate([own.loss_mask[:prompt], other.loss_mask[answer:]])[:max_length],
        label=0.0,
    )
