"""Reports on the adapters of a run: their `training.json`, and the table `adapters.md`."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moe_jax.checkpoints.training_record import DataSet, TrainingRecord
from moe_jax.config.data import SourceConfig
from moe_jax.config.parse import to_plain
from moe_jax.config.run import RunConfig
from moe_jax.data.hub import hub_address
from moe_jax.files.atomic import write_atomic
from moe_jax.tasks.training_rows import source_task
from moe_jax.training.records.metric_lines import read_metrics
from moe_jax.training.records.metric_log import (
    finite_or_none,
    last_task_scores,
    last_validation_metrics,
    training_losses,
)
from moe_jax.training.run.inputs import Inputs, Progress
from moe_jax.version import __version__

TABLE_FILES = ("adapters.json", "adapters.md")


class AdapterReport(NamedTuple):
    """Losses of an adapter.

    Attributes:
      name: name of the adapter.
      steps: optimizer steps that it made.
      folder: its final folder; None before its last step.
      validation: validation losses measured last, by set; see `Validation.losses`.
      training_loss: training loss in its last line of metrics; None without a line, or if the
        loss was not finite.
      best_loss: mean validation loss of the weights in `best/NAME`; None without those.
      best_accuracy: their mean validation accuracy, where that chose them.
    """

    name: str
    steps: int
    folder: Path | None
    validation: dict[str, float]
    training_loss: float | None
    best_loss: float | None
    best_accuracy: float | None

    @property
    def validation_loss(self) -> float | None:
        """Mean of the validation losses over the sets; None without a set."""
        return statistics.fmean(self.validation.values()) if self.validation else None

    @property
    def order(self) -> float:
        """Sort key: validation loss, or training loss without a set; infinite if not finite."""
        loss = self.training_loss if self.validation_loss is None else self.validation_loss
        loss = finite_or_none(loss)
        return math.inf if loss is None else loss


def adapter_reports(
    steps: Mapping[str, int], progress: Progress, folder: Path, metrics: Path
) -> dict[str, AdapterReport]:
    """Reports on the adapters of a run by name, lowest loss first.

    Args:
      steps: total steps of each adapter.
      progress: position of the run.
      folder: parent of the adapters' final folders.
      metrics: `metrics.jsonl` of the run; may be missing.
    """
    losses = training_losses(read_metrics(metrics, missing_ok=True))
    reports = []
    for name, count in steps.items():
        prefix, validation = f"{name}/", progress.validation.items()
        report = AdapterReport(
            name=name,
            steps=min(count, progress.step),
            folder=folder / name if count <= progress.step else None,
            validation={k.removeprefix(prefix): v for k, v in validation if k.startswith(prefix)},
            training_loss=losses.get(name),
            best_loss=progress.best.get(name),
            best_accuracy=progress.best_accuracy.get(name),
        )
        reports.append(report)
    return {report.name: report for report in sorted(reports, key=lambda report: report.order)}


def write_table(folder: Path, reports: Sequence[AdapterReport]) -> None:
    """Writes `adapters.json` and `adapters.md`; losses that are not finite are null in JSON."""
    as_json = [
        {
            "adapter": report.name,
            "steps": report.steps,
            "validation_loss": finite_or_none(report.validation_loss),
            "validation": {name: finite_or_none(v) for name, v in report.validation.items()},
            "best_loss": report.best_loss,
            "best_accuracy": report.best_accuracy,
            "training_loss": report.training_loss,
        }
        for report in reports
    ]
    header, *rows = _cells(reports)
    rule = ["---", *("---:" for _ in header[1:])]
    as_markdown = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
    texts = (json.dumps(as_json, indent=2), "\n".join(as_markdown))
    for name, text in zip(TABLE_FILES, texts, strict=True):
        write_atomic(folder / name, text + "\n")


def table_lines(reports: Sequence[AdapterReport]) -> list[str]:
    """Lines of the table for the console, in columns."""
    cells = _cells(reports)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        columns = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *columns]).rstrip())
    return lines


def _cells(reports: Sequence[AdapterReport]) -> list[list[str]]:
    """Header and a row for each adapter."""
    rows = [["adapter", "steps", "validation loss", "best", "training loss"]]
    for report in reports:
        losses = (report.validation_loss, report.best_loss, report.training_loss)
        numbers = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        if report.best_accuracy is not None:
            numbers[1] += f" (accuracy {report.best_accuracy:.4f})"
        rows.append([report.name, str(report.steps), *numbers])
    return rows


def build_training_record(
    config: RunConfig,
    inputs: Inputs,
    name: str,
    *,
    progress: Progress,
    training_loss: float | None,
    metrics: Path,
) -> TrainingRecord:
    """Builds the `training.json` of an adapter at the present step.

    Args:
      config: configuration of the run.
      inputs: base and data of the run.
      name: name of the adapter.
      progress: position of the run.
      training_loss: training loss in the adapter's last line of metrics.
      metrics: `metrics.jsonl` of the run, with all lines up to the step. Read for classifiers,
        preference adapters and those with an evaluation on tasks; missing in processes that do not
        write.
    """
    adapter, base = config.adapters[name], config.base
    train, validation = inputs.train[name], inputs.validation[name]
    losses = {source: progress.validation.get(f"{name}/{source}") for source in validation}
    has_metrics = (
        adapter.method.classification is not None
        or adapter.preference is not None
        or adapter.evaluation is not None
    )
    lines = read_metrics(metrics, missing_ok=True) if has_metrics else []
    scores_step, scores = last_task_scores(lines, name)
    return TrainingRecord(
        package_version=__version__,
        adapter=name,
        method=to_plain(adapter.method),
        base={"path": base.path, "revision": base.revision, "param_dtype": base.param_dtype},
        compute_dtype=config.compute.dtype,
        optimizer=to_plain(adapter.optimizer),
        preference=to_plain(adapter.preference),
        batch_size=adapter.batch_size,
        micro_batches=config.training.micro_batches,
        max_length=adapter.data.max_length,
        packing=adapter.data.packing,
        train_on_prompt=adapter.data.train_on_prompt,
        seed=config.seed(name),
        start_from=adapter.start_from,
        step=progress.step,
        total_steps=inputs.steps[name],
        train={
            source: data_set_record(
                replace(fields, schema=train.source_schemas[source]),
                train.source_rows[source],
                config.tasks_folder,
            )
            for source, fields in adapter.data.train.items()
        },
        validation={
            source: data_set_record(
                replace(fields, schema=validation[source].schema),
                validation[source].num_rows,
                config.tasks_folder,
            )
            for source, fields in adapter.data.validation.items()
        },
        training_loss=training_loss,
        validation_losses={source: finite_or_none(loss) for source, loss in losses.items()},
        validation_metrics={
            source: values
            for source in validation
            if (values := last_validation_metrics(lines, name, source))
        },
        best_loss=finite_or_none(progress.best.get(name)),
        best_accuracy=progress.best_accuracy.get(name),
        accuracies=scores,
        accuracies_step=scores_step,
    )


def data_set_record(source: SourceConfig, rows: int | None, tasks_folder: str | None) -> DataSet:
    """Record of a data set.

    Args:
      source: configuration of the data set, with its schema.
      rows: number of its rows; None if unknown.
      tasks_folder: `RunConfig.tasks_folder`.
    """
    paths = source.paths
    if source.task is not None:
        task = source_task(source, tasks_folder)
        paths = (task.hub.dataset if task.path is None else task.path,)
    assert source.schema is not None
    return DataSet(
        path=", ".join(paths),
        on_hub=all(hub_address(path) is not None for path in paths),
        schema=source.schema,
        task=source.task,
        split=source.split,
        revision=source.revision,
        weight=source.weight,
        rows=rows,
    )
