"""The model's side: one compiled function that scores a batch. Nothing else here sees the model."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import Segment
from moe_jax.adapters.score_head import Predictions
from moe_jax.adapters.tree import to_collection
from moe_jax.evaluation.items import Item, ItemBatch, batched, bucket, item_batch
from moe_jax.layers.names import ADAPTERS, PARAMS
from moe_jax.loaded.model import Adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.rules import BATCH_SPEC, RULES

_AHEAD = 2
"""Batches that the device may be behind; each holds memory."""

_NAME = "evaluated"
"""What every adapter is called in the compiled function, so that equal methods share it."""


class Score(NamedTuple):
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
        self, groups: Sequence[Sequence[Item]], adapter: Adapter | None, skip: Sequence[bool]
    ) -> Iterator[list[tuple[int, int, Score]]]:
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
        for places in batched(groups, self.rows):
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

    def _start(self, items: Sequence[Item], adapter: Adapter | None) -> Any:
        batch = item_batch(items, self.rows, bucket(items, self.buckets), self._candidates)
        function = self._function(None if adapter is None else adapter.method)
        trees = {} if adapter is None else {_NAME: adapter.tree}
        if self.mesh is None:
            return function(self._params, trees, batch)
        sharding = NamedSharding(self.mesh, BATCH_SPEC)
        batch = ItemBatch(*(jax.device_put(array, sharding) for array in batch))
        with jax.set_mesh(self.mesh):
            return function(self._params, trees, batch)

    def _finish(
        self, groups: Sequence[Sequence[Item]], places: list[tuple[int, int]], arrays: Any
    ) -> list[tuple[int, int, Score]]:
        sums, next_tokens, is_greedy = jax.device_get(arrays)
        found = []
        for row, (group, place) in enumerate(places):
            item = groups[group][place]
            values = (
                next_tokens[row, : len(item.candidates)] if item.candidates else sums[row : row + 1]
            )
            score = Score(tuple(values.tolist()), bool(is_greedy[row]))
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
    batch: ItemBatch,
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
