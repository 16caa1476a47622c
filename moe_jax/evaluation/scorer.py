"""Token sequences to score: their batches, and the compiled function that scores a batch."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.data.batch import PADDING_ID, doubled_lengths, padded_length
from moe_jax.loaded.inference_model import Adapter
from moe_jax.models.adapted import SINGLE, CompiledLlama, apply, single_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.rules import BATCH_SPEC, num_row_shards

_SHORTEST_BUCKET = 32

_MAX_PENDING = 2
"""Batches computed ahead of the results that are read; each holds device memory."""


class ScoredSequence(NamedTuple):
    """Token ids with the tokens to score: a continuation, or candidates for the next token.

    Attributes:
      tokens: input ids of the model.
      targets: ids that follow the last positions of `tokens`. The sum of their log-probabilities is
        the score.
      candidates: alternatives for the next token, used if `targets` is empty. The log-probability
        of each is a score.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    candidates: tuple[int, ...]

    @classmethod
    def next_token(cls, context: Sequence[int], candidates: Sequence[int]) -> Self:
        """Scores each of `candidates` as the token after `context`."""
        return cls(tuple(context), (), tuple(candidates))

    @classmethod
    def continuation(cls, context: Sequence[int], targets: Sequence[int]) -> Self:
        """Scores `targets` after `context`; neither may be empty."""
        return cls((*context, *targets[:-1]), tuple(targets), ())

    def shortened(self, length: int, lead: int) -> Self:
        """The sequence cut to `length` tokens. Those after the first `lead` are dropped.

        Raises:
          ValueError: no token would be left in front of the targets.
        """
        surplus = len(self.tokens) - length
        if surplus <= 0:
            return self
        if lead + surplus > len(self.tokens) - max(len(self.targets), 1):
            raise ValueError("the targets alone are too long")
        return self._replace(tokens=self.tokens[:lead] + self.tokens[lead + surplus :])


class SequenceBatch(NamedTuple):
    """Sequences of similar length: B rows, S positions, K candidates. Unused rows are padding.

    Attributes:
      tokens: int32 [B, S], padded on the right.
      is_token: bool [B, S], false at padding.
      first: int32 [B], position that predicts the first target, or the candidates.
      targets: int32 [B, S], the targets of each row from column 0 on, padded.
      counts: int32 [B], number of targets.
      candidates: int32 [B, K], padded; the padding is not read.
    """

    tokens: Any
    is_token: Any
    first: Any
    targets: Any
    counts: Any
    candidates: Any


def sequence_batch(
    sequences: Sequence[ScoredSequence], rows: int, length: int, candidates: int
) -> SequenceBatch:
    """Batch of `rows` rows of `length` positions and at most `candidates` candidates."""
    batch = SequenceBatch(
        tokens=np.full((rows, length), PADDING_ID, np.int32),
        is_token=np.zeros((rows, length), bool),
        first=np.zeros(rows, np.int32),
        targets=np.full((rows, length), PADDING_ID, np.int32),
        counts=np.zeros(rows, np.int32),
        candidates=np.zeros((rows, candidates), np.int32),
    )
    for row, sequence in enumerate(sequences):
        size, count = len(sequence.tokens), len(sequence.targets)
        batch.tokens[row, :size] = sequence.tokens
        batch.is_token[row, :size] = True
        batch.first[row] = size - max(count, 1)
        batch.targets[row, :count] = sequence.targets
        batch.counts[row] = count
        batch.candidates[row, : len(sequence.candidates)] = sequence.candidates
    return batch


def complete_buckets(buckets: Sequence[int], context: int) -> tuple[int, ...]:
    """The user's padded lengths, or powers of two from 32 if empty, and the context as the last."""
    if not buckets:
        return doubled_lengths(_SHORTEST_BUCKET, context)
    return (*(length for length in buckets if length < context), context)


def divide_into_batches(
    groups: Sequence[Sequence[ScoredSequence]], rows: int
) -> list[list[tuple[int, int]]]:
    """Divides groups of sequences, such as those of one question, into batches.

    Groups are sorted by their longest sequence, in descending order. Rows of a batch have similar
    length, and a batch that exceeds the memory fails at once. The division depends on the sequences
    alone, so that an interrupted evaluation resumes with the same batches.

    Args:
      groups: sequences of each group.
      rows: maximum number of sequences in a batch.

    Returns:
      Index of the group, and index in the group, of each sequence of each batch.
    """
    longest = np.array([max(len(sequence.tokens) for sequence in group) for group in groups])
    order = np.argsort(-longest, kind="stable")
    flat = [(int(group), index) for group in order for index in range(len(groups[group]))]
    return [flat[start : start + rows] for start in range(0, len(flat), rows)]


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


class SequenceScore(NamedTuple):
    """Scores of one sequence.

    Attributes:
      values: log-probability of the targets, or of each candidate, in nats; or the outputs of a
        score head.
      is_greedy: true if greedy decoding yields the targets.
    """

    values: tuple[float, ...]
    is_greedy: bool


class Scorer:
    """Scores sequences with a base model and any adapter of it."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        params: Any,
        *,
        batch_size: int,
        buckets: Sequence[int],
        candidates: int = 1,
        mesh: Mesh | None = None,
    ):
        """Sets up the scorer. Each bucket is compiled once for each adapter method, on first use.

        Args:
          model: model without adapters.
          params: frozen base parameters, on `mesh` if it is given.
          batch_size: rows of a batch, rounded up to a multiple of the devices that share them.
          buckets: padded lengths, in ascending order.
          candidates: maximum number of candidates of a sequence.
          mesh: None computes on the device that holds `params`.
        """
        num_shards = num_row_shards(mesh)
        self.rows = -(-batch_size // num_shards) * num_shards
        self.buckets = tuple(buckets)
        self.mesh = mesh
        self._llama = CompiledLlama(model, mesh)
        self._params = params
        self._candidates = candidates

    def scores(
        self,
        groups: Sequence[Sequence[ScoredSequence]],
        adapter: Adapter | None,
        skip: Sequence[bool],
    ) -> Iterator[list[tuple[int, int, SequenceScore]]]:
        """Scores all groups batch by batch, the longest sequences first.

        Args:
          groups: sequences that belong together, such as those of one question.
          adapter: None scores the base model.
          skip: true for groups whose scores are known. Batches of such groups only are left out;
            the others are unchanged, and so are their scores, bit for bit.

        Yields:
          Group index, index in the group, and score of each sequence of a batch.
        """
        pending: list[tuple[list[tuple[int, int]], Any]] = []
        for indices in divide_into_batches(groups, self.rows):
            if all(skip[group] for group, _ in indices):
                continue
            sequences = [groups[group][index] for group, index in indices]
            pending.append((indices, self._start(sequences, adapter)))
            if len(pending) > _MAX_PENDING:
                yield self._finish(groups, *pending.pop(0))
        for indices, arrays in pending:
            yield self._finish(groups, indices, arrays)

    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._llama.compilations

    def _start(self, sequences: Sequence[ScoredSequence], adapter: Adapter | None) -> Any:
        longest = max(len(sequence.tokens) for sequence in sequences)
        length = padded_length(longest, self.buckets)
        batch = sequence_batch(sequences, self.rows, length, self._candidates)
        method = None if adapter is None else adapter.method
        model = self._llama.with_rows(single_adapter(method, self.rows))
        trees = {} if adapter is None else {SINGLE: adapter.tree}
        if self.mesh is not None:
            sharding = NamedSharding(self.mesh, BATCH_SPEC)
            batch = SequenceBatch(*(jax.device_put(array, sharding) for array in batch))
        return self._llama.jit(_score, model)(self._params, trees, batch)

    def _finish(
        self,
        groups: Sequence[Sequence[ScoredSequence]],
        indices: list[tuple[int, int]],
        arrays: Any,
    ) -> list[tuple[int, int, SequenceScore]]:
        sums, next_tokens, is_greedy = jax.device_get(arrays)
        scores = []
        for row, (group, index) in enumerate(indices):
            candidates = groups[group][index].candidates
            values = next_tokens[row, : len(candidates)] if candidates else sums[row : row + 1]
            scores.append(
                (group, index, SequenceScore(tuple(values.tolist()), bool(is_greedy[row])))
            )
        return scores


def _score(
    model: LlamaForCausalLM, params: Any, trees: dict[str, Any], batch: SequenceBatch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores each row of a batch.

    Returns:
      Log-probability of the targets [B], log-probability of each candidate [B, K], and bool [B],
      true where greedy decoding yields the targets. For a classifier the candidates are indices of
      labels and their values are the outputs of its score head; the other two arrays are zero.
    """
    rows, length = batch.tokens.shape

    def compute(module: LlamaForCausalLM) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden = module.hidden_states(
            batch.tokens,
            positions=jnp.where(batch.is_token, jnp.arange(length)[None], 0),
            token_mask=batch.is_token,
        )
        scores = module.scores(hidden, batch.is_token)
        if scores:
            at_labels = jnp.take_along_axis(scores[SINGLE], batch.candidates, axis=-1)
            return jnp.zeros(rows), at_labels, jnp.zeros(rows, bool)
        continuation = (batch.first, batch.targets, batch.counts, batch.candidates)
        log_probs, is_greedy, at_candidates = module.continuation_scores(hidden, *continuation)
        return log_probs, at_candidates, is_greedy

    return apply(model, params, trees, compute)
