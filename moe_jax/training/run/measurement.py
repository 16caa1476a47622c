"""Measurements of a run's adapters: validation losses, and evaluation on tasks.

Evaluation on tasks is implemented above this package and passed in as a `TaskEvaluation`;
`train.py` passes a `moe_jax.evaluation.training_evaluator.TrainingTaskEvaluation`.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.preference import ROWS_PER_EXAMPLE, PreferenceConfig
from moe_jax.config.run import RunConfig
from moe_jax.data.batch import Batch
from moe_jax.errors import DataError
from moe_jax.sharding.rules import num_row_shards
from moe_jax.tasks.classification_metrics import metric_value
from moe_jax.training.records.recorder import TaskScores
from moe_jax.training.run.inputs import Inputs
from moe_jax.training.step.micro_batches import pad_to_multiple
from moe_jax.training.step.preference_loss import measured_answers
from moe_jax.training.step.program import Program

_MAX_PENDING = 4
"""Largest number of batches that wait for the device; each holds memory."""

EVALUATION_FOLDER = "evaluation"
"""Folder in a work directory for the results of the final evaluation and each question's answer."""

_Results = Iterable[tuple[Batch, tuple[np.ndarray, ...]]]


class Validation(NamedTuple):
    """Validation losses and metrics, by `adapter/set`.

    Attributes:
      losses: mean cross-entropy in nats, per target token or per classified row; mean squared
        error for regression; mean preference loss of an example.
      metrics: metrics of classification and preference adapters, by name.
    """

    losses: dict[str, float]
    metrics: dict[str, dict[str, float]]


def validate(
    program: Program,
    adapters: Any,
    params: Any,
    data: Mapping[str, Mapping[str, Iterable[Batch]]],
    references: Mapping[str, Any] = MappingProxyType({}),
) -> Validation:
    """Measures adapters on their validation sets.

    Args:
      program: compiled computations.
      adapters: `{adapter name: tree}`; may contain further adapters.
      params: frozen base parameters.
      data: validation sets of each adapter, as NumPy batches.
      references: see `TrainState.references`.

    Raises:
      DataError: a set has no target token.
    """
    validation = Validation({}, {})
    for adapter, sets in data.items():
        config = program.config.adapters[adapter]
        classification, preference = config.method.classification, config.preference
        evaluate = program.eval_step if classification is None else program.score_step
        step = functools.partial(evaluate, adapter, adapters, params)
        if preference is not None:
            step = _answer_steps(program, adapter, adapters, references, params)
        for name, batches in sets.items():
            label, field = f"{adapter}/{name}", f"config.adapters.{adapter}.data.validation.{name}"
            results = batch_results(program, step, batches)
            if preference is not None:
                loss, metrics = _preference_metrics(results, preference)
                validation.losses[label], validation.metrics[label] = loss, metrics
            elif classification is None:
                validation.losses[label] = _mean_loss(results, field)
            else:
                loss, metrics = _classification_metrics(results, classification)
                validation.losses[label], validation.metrics[label] = loss, metrics
    return validation


def batch_results(
    program: Program,
    step: Callable[[Batch], tuple[jax.Array, ...]],
    batches: Iterable[Batch],
) -> Iterator[tuple[Batch, tuple[np.ndarray, ...]]]:
    """Yields each batch, padded to the mesh, with the outputs of `step`.

    Args:
      program: compiled computations.
      step: function of a batch from `put_eval_batch`.
      batches: NumPy batches.
    """
    num_shards = num_row_shards(program.mesh)
    pending: collections.deque[tuple[Batch, Any]] = collections.deque()
    for batch in batches:
        padded = pad_to_multiple(batch, num_shards)
        rows = program.put_eval_batch(padded)
        pending.append((padded, step(rows)))
        if len(pending) > _MAX_PENDING:
            ready, arrays = pending.popleft()
            yield ready, jax.device_get(arrays)
    for ready, arrays in pending:
        yield ready, jax.device_get(arrays)


def _answer_steps(
    program: Program,
    name: str,
    adapters: Mapping[str, Any],
    references: Mapping[str, Any],
    params: Any,
) -> Callable[[Batch], tuple[jax.Array, ...]]:
    """Function to log-probabilities and lengths of answers, and where it is scored, reference."""
    method, preference = program.config.methods[name], program.config.preferences[name]

    def step(batch: Batch) -> tuple[jax.Array, ...]:
        answers = program.answer_step(method, adapters[name], params, batch)
        if preference.step_reference is None:
            return answers
        tree = references.get(name)
        frozen = None if tree is None else method
        return *answers, program.answer_step(frozen, tree, params, batch)[0]

    return step


def _preference_metrics(
    results: _Results, preference: PreferenceConfig
) -> tuple[float, dict[str, float]]:
    """Mean loss of the examples, and the means of their metrics."""
    parts = []
    for batch, (log_probs, counts, *reference) in results:
        stored = batch.reference_log_probs.sum(axis=-1)
        labels = batch.labels.sum(axis=-1)
        parts.append((log_probs, counts, reference[0] if reference else stored, labels))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    is_row = np.repeat(columns[1][::ROWS_PER_EXAMPLE] > 0, ROWS_PER_EXAMPLE)  # no padding
    loss, metrics = measured_answers(preference, *(column[is_row] for column in columns))
    return float(loss), {metric: float(value) for metric, value in metrics.items()}


def _mean_loss(results: _Results, field: str) -> float:
    losses, counts = [], []
    for _, (loss, count) in results:
        losses.append(float(loss))
        counts.append(float(count))
    if not sum(counts):
        raise DataError(f"{field}: no row has a token to predict")
    return math.fsum(losses) / math.fsum(counts)


def _classification_metrics(
    results: _Results, classification: ClassificationConfig
) -> tuple[float, dict[str, float]]:
    """Mean loss over rows, and the metrics of the predictions."""
    losses, predictions, labels = [], [], []
    for batch, (loss, scores) in results:
        is_row = batch.loss_mask.any(axis=-1)
        losses.append(loss[is_row])
        predicted = scores[:, 0] if classification.regression else scores.argmax(axis=-1)
        predictions.append(predicted[is_row])
        labels.append(batch.labels.sum(axis=-1)[is_row])  # 0 except at the last token
    pairs = (np.concatenate(predictions), np.concatenate(labels))
    metrics = {name: metric_value(name, *pairs) for name in classification.metrics}
    return float(np.concatenate(losses).mean(dtype=np.float64)), metrics


class EvaluationInterrupted(Exception):
    """Evaluation stopped before its end because its caller requested it."""


class ScoreTable(Protocol):
    """Results of the final evaluation; see `moe_jax.evaluation.evaluation_results.Evaluation`."""

    def scores(self, model: str) -> TaskScores:
        """Scores of one adapter."""
        ...

    def to_markdown(self) -> str: ...

    def save(self, folder: Path) -> None: ...


class TaskEvaluator(Protocol):
    """Evaluator of a run's adapters on their tasks.

    Both methods raise `EvaluationInterrupted` soon after `stop` returns True, and `ConfigError`
    for scores that are not finite.
    """

    def measure(self, name: str, tree: Any, params: Any, stop: Callable[[], bool]) -> TaskScores:
        """Evaluates one adapter during training.

        Args:
          name: name of the adapter.
          tree: weights of the adapter, on the mesh of the run.
          params: base parameters, on the same mesh.
          stop: returns True to interrupt the evaluation.
        """
        ...

    def finish(
        self,
        adapters: Mapping[str, Path],
        params: Any,
        folder: Path,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> ScoreTable:
        """Evaluates the final adapters, or continues an interrupted evaluation.

        Args:
          adapters: final folders of the adapters.
          params: base parameters, on the mesh of the run.
          folder: destination of the answers.
          say: prints a line.
          stop: returns True to interrupt the evaluation.
        """
        ...


class TaskEvaluation(Protocol):
    """Factory of `TaskEvaluator`s."""

    def is_done(self, config: RunConfig, steps: Mapping[str, int], folder: Path) -> bool:
        """True if `folder` has the results of the final evaluation that `config` describes.

        Args:
          config: configuration of the run.
          steps: last step of each adapter.
          folder: folder of the results.
        """
        ...

    def prepare(self, config: RunConfig, inputs: Inputs, program: Program) -> TaskEvaluator:
        """Reads the tasks; needs no weights.

        Raises:
          ConfigError: tasks, protocols and adapters do not fit together.
          DataError: the data of a task is invalid, or does not fit the base.
        """
        ...


def has_evaluation(config: RunConfig) -> bool:
    """True if an adapter of `config` has an evaluation on tasks."""
    return any(adapter.evaluation is not None for adapter in config.adapters.values())
