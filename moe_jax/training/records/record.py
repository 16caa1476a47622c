"""What a run puts on record of how it trained an adapter."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_jax.checkpoints.training_record import DataSet, TrainingRecord
from moe_jax.config.data import SourceConfig
from moe_jax.config.parse import to_plain
from moe_jax.config.run import RunConfig
from moe_jax.tasks.training_rows import source_task
from moe_jax.training.run.inputs import Inputs
from moe_jax.training.run.task_evaluation import by_task
from moe_jax.version import __version__


def training_record(
    config: RunConfig,
    inputs: Inputs,
    name: str,
    *,
    step: int,
    validation: Mapping[str, float],
    best: float | None,
    training_loss: float | None,
    metrics: Path,
) -> TrainingRecord:
    """The record of an adapter as it is now.

    Args:
      config: the run's configuration.
      inputs: what it read.
      name: the adapter's.
      step: where the run stands.
      validation: the losses measured last, by `adapter/set`.
      best: the adapter's lowest mean validation loss so far.
      training_loss: in the last line of metrics that has the adapter's.
      metrics: the run's `metrics.jsonl`, with all lines up to `step`; read where an adapter
        classifies or is asked for tasks.
    """
    own, base = config.adapters[name], config.base
    data, held_out = inputs.train[name], inputs.validation[name]
    losses = {source: validation.get(f"{name}/{source}") for source in held_out}
    is_measured = own.method.classification is not None or own.evaluation is not None
    lines = _lines(metrics) if is_measured else []
    step_of_accuracies, accuracies = last_accuracies(lines, name)
    return TrainingRecord(
        package_version=__version__,
        adapter=name,
        method=to_plain(own.method),
        base={"path": base.path, "revision": base.revision, "param_dtype": base.param_dtype},
        compute_dtype=config.compute.dtype,
        optimizer=to_plain(own.optimizer),
        batch_size=own.batch_size,
        micro_batches=config.training.micro_batches,
        max_length=own.data.max_length,
        packing=own.data.packing,
        train_on_prompt=own.data.train_on_prompt,
        seed=config.seed(name),
        start_from=own.start_from,
        step=step,
        total_steps=inputs.steps[name],
        train={
            source: data_set(fields, data.source_rows[source], config.tasks_folder)
            for source, fields in own.data.train.items()
        },
        validation={
            source: data_set(fields, held_out[source].num_rows, config.tasks_folder)
            for source, fields in own.data.validation.items()
        },
        training_loss=training_loss,
        validation_losses={source: _finite(loss) for source, loss in losses.items()},
        validation_metrics={
            source: found
            for source in held_out
            if (found := last_metrics(lines, f"validation/{name}/{source}"))
        },
        best_loss=_finite(best),
        accuracies=accuracies,
        accuracies_step=step_of_accuracies,
    )


def last_losses(metrics: Path) -> dict[str, float | None]:
    """Each adapter's training loss in the last line of `metrics` that has one; need not exist."""
    losses: dict[str, float | None] = {}
    if metrics.exists():  # only in the process that writes
        for text in metrics.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            places = (name.partition("/") for name in line)
            losses |= {name: line[f"{name}/loss"] for name, _, kind in places if kind == "loss"}
    return losses


def _lines(metrics: Path) -> list[dict[str, Any]]:
    """The lines of metrics, the latest first; none in processes that write nothing."""
    if not metrics.exists():
        return []
    texts = metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in reversed(texts)]


def last_metrics(lines: Iterable[Mapping[str, Any]], label: str) -> dict[str, float | None]:
    """What a classifier's predictions were measured by in the first of the lines that has it.

    Args:
      lines: of metrics, the latest first.
      label: `validation/adapter/set`.
    """
    for line in lines:
        if f"{label}/loss" in line:
            own = {k.rpartition("/"): value for k, value in line.items()}
            return {m: v for (of, _, m), v in own.items() if of == label and m != "loss"}
    return {}


def last_accuracies(
    lines: Iterable[Mapping[str, Any]], name: str
) -> tuple[int | None, dict[str, dict[str, float]]]:
    """The step and the accuracies, by task and measure, of the first line that has an adapter's."""
    prefix = f"evaluation/{name}/"
    for line in lines:
        own = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        if own:
            return line["step"], by_task(own)
    return None, {}


def data_set(source: SourceConfig, rows: int, tasks_folder: str | None) -> DataSet:
    """What is recorded of a data set of `rows` rows; `tasks_folder` is the run's."""
    path = source.path
    if source.task is not None:
        task = source_task(source, tasks_folder)
        path = task.hub.dataset if task.path is None else task.path
    return DataSet(
        path=path,
        on_hub=not Path(path).expanduser().exists(),  # it was read, so it is somewhere
        schema=source.schema,
        task=source.task,
        split=source.split,
        revision=source.revision,
        weight=source.weight,
        rows=rows,
    )


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
