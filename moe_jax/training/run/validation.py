"""Loss on held-out rows, and how well they are classified."""

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.config.classification import ClassificationConfig
from moe_jax.data.batch import Batch
from moe_jax.errors import DataError
from moe_jax.tasks.classification_metrics import metric_value
from moe_jax.training.step.micro_batches import pad_to_multiple
from moe_jax.training.step.program import Program

_AHEAD = 4
"""Batches that the device may be behind; each holds memory."""


class Validation(NamedTuple):
    """What was measured, by `adapter/set`.

    Attributes:
      losses: mean cross-entropy in nats per target token, or per row that is classified; of a
        number, the mean squared error.
      metrics: of classification adapters, by name.
    """

    losses: dict[str, float]
    metrics: dict[str, dict[str, float]]


def validate(
    program: Program,
    adapters: Any,
    params: Any,
    data: Mapping[str, Mapping[str, Iterable[Batch]]],
) -> Validation:
    """Measures adapters on every validation set of theirs.

    Args:
      program: the compiled computations.
      adapters: `{adapter name: tree}`; may hold others too.
      params: the frozen base.
      data: the validation sets of each adapter, as NumPy batches.

    Raises:
      DataError: a set without any target token.
    """
    found = Validation({}, {})
    for adapter, sets in data.items():
        classification = program.config.adapters[adapter].method.classification
        for name, batches in sets.items():
            label, field = f"{adapter}/{name}", f"config.adapters.{adapter}.data.validation.{name}"
            step = program.eval_step if classification is None else program.score_step
            results = _results(program, step, adapter, adapters, params, batches)
            if classification is None:
                found.losses[label] = _mean_loss(results, field)
            else:
                found.losses[label], found.metrics[label] = _classified(results, classification)
    return found


def _results(
    program: Program,
    step: Callable[..., tuple[jax.Array, jax.Array]],
    adapter: str,
    adapters: Any,
    params: Any,
    batches: Iterable[Batch],
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Each batch and what `step` made of it."""
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    pending: collections.deque[tuple[Batch, Any]] = collections.deque()
    for batch in batches:
        whole = pad_to_multiple(batch, ways)
        rows = program.put_eval_batch(whole)
        pending.append((whole, step(adapter, adapters, params, rows)))
        if len(pending) > _AHEAD:
            ready, arrays = pending.popleft()
            yield ready, *jax.device_get(arrays)
    for ready, arrays in pending:
        yield ready, *jax.device_get(arrays)


def _mean_loss(results: Iterable[tuple[Batch, np.ndarray, np.ndarray]], field: str) -> float:
    losses, counts = [], []
    for _, loss, count in results:
        losses.append(float(loss))
        counts.append(float(count))
    if not sum(counts):
        raise DataError(f"{field}: no row has a token to predict")
    return math.fsum(losses) / math.fsum(counts)


def _classified(
    results: Iterable[tuple[Batch, np.ndarray, np.ndarray]], classification: ClassificationConfig
) -> tuple[float, dict[str, float]]:
    """The mean loss of the rows, and the metrics of their predictions."""
    losses, predicted, labels = [], [], []
    for batch, loss, scores in results:
        is_row = batch.loss_mask.any(axis=-1)
        losses.append(loss[is_row])
        choice = scores[:, 0] if classification.regression else scores.argmax(axis=-1)
        predicted.append(choice[is_row])
        labels.append(batch.labels.sum(axis=-1)[is_row])  # all but the last token's are 0
    found = (np.concatenate(predicted), np.concatenate(labels))
    metrics = {name: metric_value(name, *found) for name in classification.metrics}
    return float(np.concatenate(losses).mean(dtype=np.float64)), metrics
