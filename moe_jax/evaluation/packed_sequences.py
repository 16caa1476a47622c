"""Token sequences to score, and the packed rows in which a model reads them.

The sequences of a question, one for each of its choices, begin with the same tokens. A row holds
these tokens once, followed by the rest of each sequence as a branch: a branch attends to the tokens
before it in its own sequence only (see `moe_jax.layers.tokens.BRANCH`). A row holds the questions
that fit into it one after another, as packed rows of training hold sequences.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from moe_jax.data.batch import PADDING_ID
from moe_jax.layers.tokens import BRANCH

_SHORTEST_ROW = 32


class ScoredSequence(NamedTuple):
    """Token ids, the last of which are scored.

    Attributes:
      tokens: input ids of the model.
      targets: ids that follow the last positions of `tokens`, at least one. The sum of their
        log-probabilities is the score.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def continuation(cls, context: Sequence[int], targets: Sequence[int]) -> Self:
        """Scores `targets` after `context`; neither may be empty."""
        return cls((*context, *targets[:-1]), tuple(targets))

    def shortened(self, length: int, lead: int) -> Self:
        """The sequence cut to `length` tokens. Those after the first `lead` are dropped.

        Raises:
          ValueError: no token would be left in front of the targets.
        """
        surplus = len(self.tokens) - length
        if surplus <= 0:
            return self
        if lead + surplus > len(self.tokens) - len(self.targets):
            raise ValueError("the targets alone are too long")
        return self._replace(tokens=self.tokens[:lead] + self.tokens[lead + surplus :])


class Tree(NamedTuple):
    """Sequences that share their first tokens.

    Attributes:
      members: index of the group, and index in the group, of each sequence.
      stem: number of tokens that all of them share and a row holds once.
      size: positions that the tree takes in a row.
    """

    members: tuple[tuple[int, int], ...]
    stem: int
    size: int


class PackedTrees(NamedTuple):
    """The content of a batch.

    Attributes:
      rows: trees of each row.
      length: positions of a row.
    """

    rows: tuple[tuple[Tree, ...], ...]
    length: int


class SequenceBatch(NamedTuple):
    """Packed rows: B rows of S positions. A row scores at most S targets.

    Attributes:
      tokens: int32 [B, S].
      segment_ids: int32 [B, S], 0 at padding; the tree of a row from 1 on, and in a branch
        `BRANCH` times its number more.
      positions: int32 [B, S], position of each token in its sequence.
      places: int32 [B, S], positions of the row that predict its targets, from column 0 on.
      targets: int32 [B, S].
      counts: int32 [B], number of targets.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    places: Any
    targets: Any
    counts: Any


class Slot(NamedTuple):
    """Columns of a batch's `targets` that belong to a sequence.

    Attributes:
      group: index of the sequence's group.
      member: index of the sequence in the group.
      row: row of the batch.
      columns: columns of that row.
    """

    group: int
    member: int
    row: int
    columns: slice


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    for index, ids in enumerate(zip(*sequences, strict=False)):
        if len(set(ids)) > 1:
            return index
    return min(map(len, sequences))


def make_trees(groups: Sequence[Sequence[ScoredSequence]], longest: int) -> list[Tree]:
    """Trees of all groups, by size in descending order.

    Args:
      groups: sequences that may share tokens, such as those of one question.
      longest: size of the largest tree. Sequences of a group whose tree would be larger do not
        share their tokens. 0 lets no sequences share.
    """
    trees = []
    for group, sequences in enumerate(groups):
        members = tuple((group, index) for index in range(len(sequences)))
        tree = _tree(members, sequences)
        if tree.size <= longest:
            trees.append(tree)
        else:
            trees += [
                _tree((member,), [sequence])
                for member, sequence in zip(members, sequences, strict=True)
            ]
    return sorted(trees, key=lambda tree: -tree.size)


def _tree(members: tuple[tuple[int, int], ...], sequences: Sequence[ScoredSequence]) -> Tree:
    stem = shared_prefix([sequence.tokens for sequence in sequences])
    tokens = stem + sum(len(sequence.tokens) - stem for sequence in sequences)
    targets = sum(len(sequence.targets) for sequence in sequences)
    return Tree(members, stem, max(tokens, targets))


def pack_trees(trees: Sequence[Tree], rows: int, row_length: int) -> list[PackedTrees]:
    """Divides trees into batches of `rows` rows.

    The largest come first, so that a batch that exceeds the memory fails at once. The division
    depends on the trees alone, so that an interrupted evaluation resumes with the same batches.

    Args:
      trees: trees by size in descending order.
      rows: rows of a batch.
      row_length: positions of a row. Rows double in length until they hold their largest tree, and
        are shorter where one batch of shorter rows holds everything.
    """
    total = sum(tree.size for tree in trees)
    shortest = _SHORTEST_ROW
    # A quarter is left for the ends of rows, where no tree fits.
    while shortest < row_length and shortest * rows < 1.25 * total:
        shortest *= 2
    shortest = min(shortest, row_length)
    batches: list[PackedTrees] = []
    contents: list[list[Tree]] = []
    room: list[int] = []
    length = 0

    def close() -> None:
        if contents:
            batches.append(PackedTrees(tuple(map(tuple, contents)), length))

    for tree in trees:
        row = next((row for row, free in enumerate(room) if free >= tree.size), None)
        if row is None:
            close()
            length = shortest
            while length < tree.size:
                length *= 2
            contents, room, row = [[] for _ in range(rows)], [length] * rows, 0
        contents[row].append(tree)
        room[row] -= tree.size
    close()
    return batches


def sequence_batch(
    groups: Sequence[Sequence[ScoredSequence]], packed: PackedTrees
) -> tuple[SequenceBatch, list[Slot]]:
    """Arrays of a batch, and the targets of each of its sequences."""
    shape = (len(packed.rows), packed.length)
    batch = SequenceBatch(
        tokens=np.full(shape, PADDING_ID, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        places=np.zeros(shape, np.int32),
        targets=np.full(shape, PADDING_ID, np.int32),
        counts=np.zeros(shape[0], np.int32),
    )
    slots = []
    for row, trees in enumerate(packed.rows):
        start = column = 0
        for number, tree in enumerate(trees, start=1):
            stem = tree.stem
            end = start
            for branch, (group, index) in enumerate(tree.members):
                sequence = groups[group][index]
                if branch == 0:
                    end += stem
                    batch.tokens[row, start:end] = sequence.tokens[:stem]
                    batch.segment_ids[row, start:end] = number
                    batch.positions[row, start:end] = np.arange(stem)
                size, count = len(sequence.tokens), len(sequence.targets)
                rest = slice(end, end + size - stem)
                batch.tokens[row, rest] = sequence.tokens[stem:]
                batch.segment_ids[row, rest] = number + (branch + 1) * BRANCH
                batch.positions[row, rest] = np.arange(stem, size)
                columns = slice(column, column + count)
                predicting = np.arange(size - count, size)
                batch.places[row, columns] = predicting + np.where(
                    predicting < stem, start, end - stem
                )
                batch.targets[row, columns] = sequence.targets
                slots.append(Slot(group, index, row, columns))
                end, column = rest.stop, columns.stop
            start += tree.size
        batch.counts[row] = column
    return batch, slots


def sequences_digest(groups: Sequence[Sequence[ScoredSequence]], answers: Sequence[int]) -> str:
    """Digest of all token ids that are scored and of the right answers."""
    digest = hashlib.sha256()
    for sequences, answer in zip(groups, answers, strict=True):
        numbers: list[int] = [answer, len(sequences)]
        for sequence in sequences:
            for ids in sequence:
                numbers += [len(ids), *ids]
        digest.update(np.array(numbers, np.int64).tobytes())
    return digest.hexdigest()[:32]
