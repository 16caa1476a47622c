"""What a run puts on record of how it trained an adapter."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from moe_jax.checkpoints.training_record import DataSet, TrainingRecord
from moe_jax.config.data import SourceConfig
from moe_jax.config.registry import to_plain
from moe_jax.config.run import RunConfig
from moe_jax.tasks.training_rows import source_task
from moe_jax.training.inputs import Inputs
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
    """
    own, base = config.adapters[name], config.base
    data, held_out = inputs.train[name], inputs.validation[name]
    losses = {source: validation.get(f"{name}/{source}") for source in held_out}
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
        train_on_prompt=own.data.train_on_prompt,
        seed=config.seed(name),
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
        best_loss=_finite(best),
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
