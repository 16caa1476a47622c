"""How the adapters of a run came out, side by side."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.files.atomic import write_atomic
from moe_jax.training.run.session import Progress

TABLE_FILES = ("adapters.json", "adapters.md")


class AdapterReport(NamedTuple):
    """How an adapter came out.

    Attributes:
      name: of the adapter.
      steps: how many optimiser steps it made.
      folder: where it is; None as long as it has not finished.
      validation: its losses measured last, by set; see `Validation.losses`.
      training_loss: of its last line of metrics, None if there is none.
      best_loss: the lowest mean validation loss, of what is in `best/NAME`; None if that was not
        kept.
    """

    name: str
    steps: int
    folder: Path | None
    validation: dict[str, float]
    training_loss: float | None
    best_loss: float | None

    @property
    def validation_loss(self) -> float | None:
        """The mean over its sets; None without any."""
        return statistics.fmean(self.validation.values()) if self.validation else None

    @property
    def order(self) -> float:
        """What reports are sorted by: the validation loss, or else the training loss."""
        loss = self.training_loss if self.validation_loss is None else self.validation_loss
        return loss if loss is not None and math.isfinite(loss) else math.inf


def adapter_reports(
    steps: Mapping[str, int], progress: Progress, folder: Path, metrics: Path
) -> dict[str, AdapterReport]:
    """The adapters of a run by name, the one with the lowest loss first.

    Args:
      steps: how many each adapter makes.
      progress: where the run stands.
      folder: holds a folder for each adapter that has finished.
      metrics: the run's `metrics.jsonl`; need not exist.
    """
    training = _training_losses(metrics)
    reports = []
    for name, count in steps.items():
        prefix, losses = f"{name}/", progress.validation.items()
        report = AdapterReport(
            name=name,
            steps=min(count, progress.step),
            folder=folder / name if count <= progress.step else None,
            validation={k.removeprefix(prefix): v for k, v in losses if k.startswith(prefix)},
            training_loss=training.get(name),
            best_loss=progress.best.get(name),
        )
        reports.append(report)
    return {report.name: report for report in sorted(reports, key=lambda report: report.order)}


def write_table(folder: Path, reports: Sequence[AdapterReport]) -> None:
    """Writes `adapters.json` and `adapters.md`."""
    as_json = [
        {
            "adapter": report.name,
            "steps": report.steps,
            "validation_loss": report.validation_loss,
            "validation": report.validation,
            "best_loss": report.best_loss,
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
    """The table for people, in columns."""
    cells = _cells(reports)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        columns = [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *columns]).rstrip())
    return lines


def _cells(reports: Sequence[AdapterReport]) -> list[list[str]]:
    """The header and a row for each adapter."""
    rows = [["adapter", "steps", "validation loss", "best", "training loss"]]
    for report in reports:
        losses = (report.validation_loss, report.best_loss, report.training_loss)
        numbers = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        rows.append([report.name, str(report.steps), *numbers])
    return rows


def _training_losses(metrics: Path) -> dict[str, float]:
    """The last loss of each adapter that is a number."""
    if not metrics.exists():
        return {}
    losses = {}
    for text in metrics.read_text(encoding="utf-8").splitlines():
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError:  # another process is writing it
            break
        for key, value in line.items():
            name, _, kind = key.rpartition("/")
            if kind == "loss" and not name.startswith("validation/") and value is not None:
                losses[name] = value
    return losses
