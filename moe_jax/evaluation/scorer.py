"""What a model is asked to score, and which of it goes into one batch."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import Segment
from moe_jax.adapters.score_head import Predictions
from moe_jax.adapters.tree import to_collection
from moe_jax.data.batch import PADDING_ID, doubled_lengths, padded_length
from moe_jax.layers.names import ADAPTERS, PARAMS
from moe_jax.loaded.model import Adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.rules import BATCH_SPEC, RULES

SHORTEST_BUCKET = 32


class ScoredSequence(NamedTuple):
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


class SequenceBatch(NamedTuple):
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


def sequence_batch(
    items: Sequence[ScoredSequence], rows: int, length: int, candidates: int
) -> SequenceBatch:
    """A batch of `rows` rows of `length` positions, with places for so many candidates."""
    batch = SequenceBatch(
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


def complete_buckets(buckets: Sequence[int], context: int) -> tuple[int, ...]:
    """The `buckets` that the user gave, or else the default ones; the context is the last one."""
    if not buckets:
        return default_buckets(context)
    return (*(length for length in buckets if length < context), context)


def bucket(items: Sequence[ScoredSequence], buckets: Sequence[int]) -> int:
    """The smallest of the ascending `buckets` that all items fit into."""
    return padded_length(max(len(item.tokens) for item in items), buckets)


def divide_into_batches(
    groups: Sequence[Sequence[ScoredSequence]], rows: int
) -> list[list[tuple[int, int]]]:
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


def sequences_digest(groups: Sequence[Sequence[ScoredSequence]], answers: Sequence[int]) -> str:
    """Of all ids that the model is given and of the right answers, whatever they were made from."""
    digest = hashlib.sha256()
    for items, answer in zip(groups, answers, strict=True):
        numbers: list[int] = [answer, len(items)]
        for item in items:
            for part in item:
                numbers += [len(part), *part]
        digest.update(np.array(numbers, np.int64).tobytes())
    return digest.hexdigest()[:32]


# FIXME docstring of the merged evaluation.scorer:
# """The model's side: one compiled function that scores a batch. Nothing else here sees the model."""


_AHEAD = 2
"""Batches that the device may be behind; each holds memory."""

_NAME = "evaluated"
"""What every adapter is called in the compiled function, so that equal methods share it."""


class SequenceScore(NamedTuple):
    """What the model says about an item.

    Attributes:
      values: the log-probability of the targets, or of each candidate, in nats; or a classifier's
        scores.
      is_greedy: whether each target is the likeliest token at its place.
    """

    values: tuple[float, ...]
    is_greedy: bool


class Scorer:
    """Scores items with a base and any adapter on it."""

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
        """Prepares; nothing is compiled yet. Each bucket is one compilation for each method.

        Args:
          model: without segments.
          params: the frozen base, on `mesh` if there is one.
          batch_size: rows of a batch; rounded up to a multiple of the devices that share them.
          buckets: ascending lengths that rows are padded to.
          candidates: of an item, at most.
          mesh: None computes on the device that holds `params`.
        """
        ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows = -(-batch_size // ways) * ways
        self.buckets = tuple(buckets)
        self.mesh = mesh
        self._model = model
        self._params = params
        self._candidates = candidates
        self._functions: list[tuple[AdapterMethod | None, Callable[..., Any]]] = []

    def scores(
        self,
        groups: Sequence[Sequence[ScoredSequence]],
        adapter: Adapter | None,
        skip: Sequence[bool],
    ) -> Iterator[list[tuple[int, int, SequenceScore]]]:
        """Scores the items of all groups, batch by batch; the longest come first.

        Args:
          groups: items that belong together, such as those of one question.
          adapter: None scores the base as it is.
          skip: groups whose scores are known; a batch with none but those is left out. The other
            batches are the same as without, so that their scores are too, to the bit.

        Yields:
          Group, place in the group and score of each item of a batch.
        """
        pending: list[tuple[list[tuple[int, int]], Any]] = []
        for places in divide_into_batches(groups, self.rows):
            if all(skip[group] for group, _ in places):
                continue
            items = [groups[group][place] for group, place in places]
            pending.append((places, self._start(items, adapter)))
            if len(pending) > _AHEAD:
                yield self._finish(groups, *pending.pop(0))
        for places, arrays in pending:
            yield self._finish(groups, places, arrays)

    def compilations(self) -> int:
        """How many programs were compiled so far."""
        return sum(function._cache_size() for _, function in self._functions)  # type: ignore[attr-defined]

    def _start(self, items: Sequence[ScoredSequence], adapter: Adapter | None) -> Any:
        batch = sequence_batch(items, self.rows, bucket(items, self.buckets), self._candidates)
        function = self._function(None if adapter is None else adapter.method)
        trees = {} if adapter is None else {_NAME: adapter.tree}
        if self.mesh is None:
            return function(self._params, trees, batch)
        sharding = NamedSharding(self.mesh, BATCH_SPEC)
        batch = SequenceBatch(*(jax.device_put(array, sharding) for array in batch))
        with jax.set_mesh(self.mesh):
            return function(self._params, trees, batch)

    def _finish(
        self, groups: Sequence[Sequence[ScoredSequence]], places: list[tuple[int, int]], arrays: Any
    ) -> list[tuple[int, int, SequenceScore]]:
        sums, next_tokens, is_greedy = jax.device_get(arrays)
        found = []
        for row, (group, place) in enumerate(places):
            item = groups[group][place]
            values = (
                next_tokens[row, : len(item.candidates)] if item.candidates else sums[row : row + 1]
            )
            score = SequenceScore(tuple(values.tolist()), bool(is_greedy[row]))
            found.append((group, place, score))
        return found

    def _function(self, method: AdapterMethod | None) -> Callable[..., Any]:
        for known, function in self._functions:
            if known == method:
                return function
        function = jax.jit(functools.partial(_score, self._model, method))
        self._functions.append((method, function))
        return function


def _score(
    model: LlamaForCausalLM,
    method: AdapterMethod | None,
    params: Any,
    trees: dict[str, Any],
    batch: SequenceBatch,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores each row of a batch.

    Returns:
      The log-probability of its targets [B], of its candidates [B, K], and whether greedy decoding
      gives its targets [B]. The candidates of a classifier are indices of its labels, and theirs
      are its scores; it has nothing else.
    """
    rows, length = batch.tokens.shape
    segments = () if method is None else (Segment(_NAME, method, 0, rows),)
    with nn.logical_axis_rules(RULES):
        logits: Any = model.clone(segments=segments).apply(
            {PARAMS: params, ADAPTERS: to_collection(trees)},
            batch.tokens,
            positions=jnp.where(batch.is_token, jnp.arange(length), 0),
            token_mask=batch.is_token,
        )
    if isinstance(logits, Predictions):
        scores = jnp.take_along_axis(logits.scores[_NAME], batch.candidates, axis=-1)
        return jnp.zeros(rows), scores, jnp.zeros(rows, bool)
    total = jax.nn.logsumexp(logits, axis=-1)  # [B, S]
    chosen = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0] - total
    sums = jnp.sum(jnp.where(batch.is_target, chosen, 0.0), axis=-1)
    is_likeliest = jnp.argmax(logits, axis=-1) == batch.targets
    is_greedy = jnp.all(is_likeliest | ~batch.is_target, axis=-1)
    every = jnp.arange(rows)
    at_last = jnp.take_along_axis(logits[every, batch.last], batch.candidates, axis=-1)
    return sums, at_last - total[every, batch.last][:, None], is_greedy
