"""What a model is asked to score, and which of it goes into one batch."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from moe_jax.data.batch import PADDING_ID, doubled_lengths, padded_length

SHORTEST_BUCKET = 32


class Item(NamedTuple):
    """A sequence of ids, and what is asked of it.

    Attributes:
      tokens: what the model reads.
      targets: the ids that follow its last positions: their summed log-probability is the score.
      candidates: instead, ids of which each may come next: each one's log-probability is a score.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    candidates: tuple[int, ...]

    @classmethod
    def next_token(cls, context: Sequence[int], candidates: Sequence[int]) -> Self:
        """Asks for the log-probability of each candidate as the next token."""
        return cls(tuple(context), (), tuple(candidates))

    @classmethod
    def continuation(cls, context: Sequence[int], targets: Sequence[int]) -> Self:
        """Asks for the log-probability of `targets` after `context`; neither is empty."""
        return cls((*context, *targets[:-1]), tuple(targets), ())

    def shortened(self, length: int, lead: int) -> Self:
        """The same with `length` tokens at most: those after the first `lead` go first.

        Raises:
          ValueError: targets would lose the token before them.
        """
        surplus = len(self.tokens) - length
        if surplus <= 0:
            return self
        if lead + surplus > len(self.tokens) - max(len(self.targets), 1):
            raise ValueError("the targets alone are too long")
        return self._replace(tokens=self.tokens[:lead] + self.tokens[lead + surplus :])


class ItemBatch(NamedTuple):
    """Items of like length; B rows, S positions, K candidates. Rows beyond the items are empty.

    Attributes:
      tokens: int32 [B, S], padded on the right.
      targets: int32 [B, S], what follows each position; read where `is_target`.
      is_token: bool [B, S], false at padding.
      is_target: bool [B, S].
      last: int32 [B], the place of each row's last token.
      candidates: int32 [B, K]; those beyond an item's own are never read.
    """

    tokens: Any
    targets: Any
    is_token: Any
    is_target: Any
    last: Any
    candidates: Any


def item_batch(items: Sequence[Item], rows: int, length: int, candidates: int) -> ItemBatch:
    """A batch of `rows` rows of `length` positions, with places for so many candidates."""
    batch = ItemBatch(
        tokens=np.full((rows, length), PADDING_ID, np.int32),
        targets=np.full((rows, length), PADDING_ID, np.int32),
        is_token=np.zeros((rows, length), bool),
        is_target=np.zeros((rows, length), bool),
        last=np.zeros(rows, np.int32),
        candidates=np.zeros((rows, candidates), np.int32),
    )
    for row, item in enumerate(items):
        size = len(item.tokens)
        scored = slice(size - len(item.targets), size)
        batch.tokens[row, :size] = item.tokens
        batch.is_token[row, :size] = True
        batch.targets[row, scored] = item.targets
        batch.is_target[row, scored] = True
        batch.last[row] = size - 1
        batch.candidates[row, : len(item.candidates)] = item.candidates
    return batch


def default_buckets(context: int) -> tuple[int, ...]:
    """Row lengths to pad to, each twice the one before, up to the model's context."""
    return doubled_lengths(SHORTEST_BUCKET, context)


def whole_buckets(buckets: Sequence[int], context: int) -> tuple[int, ...]:
    """The `buckets` that the user gave, or else the default ones; the context is the last one."""
    if not buckets:
        return default_buckets(context)
    return (*(length for length in buckets if length < context), context)


def bucket(items: Sequence[Item], buckets: Sequence[int]) -> int:
    """The smallest of the ascending `buckets` that all items fit into."""
    return padded_length(max(len(item.tokens) for item in items), buckets)


def batched(groups: Sequence[Sequence[Item]], rows: int) -> list[list[tuple[int, int]]]:
    """Divides groups of items, such as those of one question, into batches.

    Groups go in the order of their longest item, the longest first, so that a batch has rows of
    like length and too large a batch fails at once. The division depends on the items alone.

    Args:
      groups: the items of each group.
      rows: items of a batch, at most.

    Returns:
      For each batch, the group of each item and its place there.
    """
    longest = np.array([max(len(item.tokens) for item in items) for items in groups])
    order = np.argsort(-longest, kind="stable")
    flat = [(int(group), place) for group in order for place in range(len(groups[group]))]
    return [flat[start : start + rows] for start in range(0, len(flat), rows)]


def items_digest(groups: Sequence[Sequence[Item]], answers: Sequence[int]) -> str:
    """Of all ids that the model is given and of the right answers, whatever they were made from."""
    digest = hashlib.sha256()
    for items, answer in zip(groups, answers, strict=True):
        numbers: list[int] = [answer, len(items)]
        for item in items:
            for part in item:
                numbers += [len(part), *part]
        digest.update(np.array(numbers, np.int64).tobytes())
    return digest.hexdigest()[:32]
