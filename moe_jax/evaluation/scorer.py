"""Compiled scoring of token sequences with a base model and its adapters."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.data.batch import PADDING_ID
from moe_jax.evaluation.packed_sequences import (
    ScoredSequence,
    SequenceBatch,
    make_trees,
    pack_trees,
    sequence_batch,
)
from moe_jax.loaded.inference_model import Adapter
from moe_jax.models.adapted import SINGLE, CompiledLlama, apply, single_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.placement import place
from moe_jax.sharding.rules import BATCH_SPEC, num_row_shards

ROW_LENGTH = 256
"""Default length of rows in tokens."""

_SHORTEST_TEXT = 32

_MAX_PENDING = 2
"""Batches computed ahead of the results that are read; each holds device memory."""

T = TypeVar("T")


class SequenceScore(NamedTuple):
    """Score of one sequence.

    Attributes:
      log_prob: sum of the log-probabilities of the targets, in nats.
      is_greedy: true if greedy decoding yields the targets.
    """

    log_prob: float
    is_greedy: bool


class Scorer:
    """Scores sequences and classifies texts with a base model and any adapter of it."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        params: Any,
        *,
        batch_size: int,
        row_length: int = ROW_LENGTH,
        mesh: Mesh | None = None,
    ):
        """Sets up the scorer. Each length of rows is compiled once for each adapter method.

        Args:
          model: model without adapters.
          params: frozen base parameters, on `mesh` if it is given.
          batch_size: rows of a batch, rounded up to a multiple of the devices that share them.
          row_length: positions of a row, see `pack_trees`.
          mesh: None computes on the device that holds `params`.
        """
        num_shards = num_row_shards(mesh)
        self.rows = -(-batch_size // num_shards) * num_shards
        self.row_length = row_length
        self._mesh = mesh
        self._llama = CompiledLlama(model, mesh)
        self._params = params

    def scores(
        self,
        groups: Sequence[Sequence[ScoredSequence]],
        adapter: Adapter | None,
        skip: Sequence[bool],
    ) -> Iterator[list[tuple[int, int, SequenceScore]]]:
        """Scores all groups batch by batch, the longest first.

        Args:
          groups: sequences that may share their first tokens, such as those of one question.
          adapter: None scores the base model.
          skip: true for groups whose scores are known. Batches of such groups only are left out;
            the others are unchanged, and so are their scores, bit for bit.

        Yields:
          Group index, index in the group, and score of each sequence of a batch.
        """
        trees = make_trees(groups, self._longest_tree(adapter))

        def batches() -> Iterator[tuple[Any, Any]]:
            for packed in pack_trees(trees, self.rows, self.row_length):
                batch, slots = sequence_batch(groups, packed)
                if not all(skip[slot.group] for slot in slots):
                    yield slots, self._start(_target_scores, adapter, batch)

        for slots, (log_probs, is_likeliest) in _computed_ahead(batches()):
            yield [
                (
                    slot.group,
                    slot.member,
                    SequenceScore(
                        float(log_probs[slot.row, slot.columns].sum(dtype=np.float64)),
                        bool(is_likeliest[slot.row, slot.columns].all()),
                    ),
                )
                for slot in slots
            ]

    def class_scores(
        self, texts: Sequence[Sequence[int]], adapter: Adapter, skip: Sequence[bool]
    ) -> Iterator[list[tuple[int, np.ndarray]]]:
        """Outputs of a classifier's score head, batch by batch, for the longest texts first.

        Args:
          texts: token ids of each text.
          adapter: classifier.
          skip: true for texts whose scores are known; see `scores`.

        Yields:
          Index and scores, float32 [N], of each text of a batch.
        """
        order = np.argsort([-len(text) for text in texts], kind="stable").tolist()

        def batches() -> Iterator[tuple[Any, Any]]:
            for start in range(0, len(order), self.rows):
                indices = order[start : start + self.rows]
                if all(skip[index] for index in indices):
                    continue
                length = _SHORTEST_TEXT
                while length < len(texts[indices[0]]):
                    length *= 2
                tokens = np.full((self.rows, length), PADDING_ID, np.int32)
                is_token = np.zeros(tokens.shape, bool)
                for row, index in enumerate(indices):
                    tokens[row, : len(texts[index])] = texts[index]
                    is_token[row, : len(texts[index])] = True
                yield indices, self._start(_class_scores, adapter, (tokens, is_token))

        for indices, scores in _computed_ahead(batches()):
            yield [(index, scores[row]) for row, index in enumerate(indices)]

    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._llama.compilations

    def _longest_tree(self, adapter: Adapter | None) -> int:
        """Size of the largest tree that leaves every sequence its own score."""
        config = self._llama.model.config
        if adapter is not None and adapter.method.routes_by_sequence:
            return 0
        if config.delta_net is not None:  # a branch would need the state before the others
            return 0
        longest = max(self.row_length, config.max_position_embeddings)
        # A window counts positions of the row, which are those of a sequence up to its branch only.
        return min(longest, config.sliding_window or longest)

    def _start(self, function: Callable[..., Any], adapter: Adapter | None, batch: Any) -> Any:
        """Starts to compute `function` of a batch of arrays."""
        method = None if adapter is None else adapter.method
        model = self._llama.with_rows(single_adapter(method, self.rows))
        trees = {} if adapter is None else {SINGLE: adapter.tree}
        if self._mesh is not None:
            batch = place(batch, NamedSharding(self._mesh, BATCH_SPEC))
        replicate = jax.process_count() > 1  # a process reads all rows
        return self._llama.jit(function, model, replicate=replicate)(self._params, trees, batch)


def _computed_ahead(batches: Iterator[tuple[T, Any]]) -> Iterator[tuple[T, Any]]:
    """The results of batches as NumPy arrays, read while later batches are computed."""
    pending: list[tuple[T, Any]] = []
    for batch in batches:
        pending.append(batch)
        if len(pending) > _MAX_PENDING:
            key, arrays = pending.pop(0)
            yield key, jax.device_get(arrays)
    for key, arrays in pending:
        yield key, jax.device_get(arrays)


def _target_scores(
    model: LlamaForCausalLM, params: Any, trees: dict[str, Any], batch: SequenceBatch
) -> tuple[jax.Array, jax.Array]:
    """The result of `LlamaForCausalLM.target_scores` for a batch."""

    def compute(module: LlamaForCausalLM) -> tuple[jax.Array, jax.Array]:
        hidden = module.hidden_states(
            batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
        )
        return module.target_scores(hidden, batch.places, batch.targets, batch.counts)

    return apply(model, params, trees, compute)


def _class_scores(
    model: LlamaForCausalLM,
    params: Any,
    trees: dict[str, Any],
    batch: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Scores float32 [B, N] of a classifier for rows of one text each."""
    tokens, is_token = batch

    def compute(module: LlamaForCausalLM) -> jax.Array:
        # Positions of padding do not exceed those of the text, see `rope_frequencies`.
        positions = jnp.where(is_token, jnp.arange(tokens.shape[1])[None], 0)
        hidden = module.hidden_states(tokens, positions=positions, token_mask=is_token)
        return module.scores(hidden, is_token)[SINGLE]

    return apply(model, params, trees, compute)
