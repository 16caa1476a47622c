"""Metrics from the device to TensorBoard and Weights & Biases, and values of lines of metrics.

Names and aggregation of metrics are in `moe_jax.config.metric_names`.
"""

import collections
import contextlib
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from moe_jax.adapters.tree import expert_name
from moe_jax.config.metric_names import metric_semantics
from moe_jax.config.run import LoggingConfig
from moe_jax.errors import ConfigError
from moe_jax.files.disk import disk_errors
from moe_jax.training.step.router_metrics import row_locations

TIME = "time"
"""Field of a line with times and memory of the process; all others are equal in equal runs."""

_T = TypeVar("_T")


class PendingMetrics:
    """Metrics of the newest steps, which the device may still be computing.

    Reading a value waits for its step. Only values that are `lag` steps old are read, so that the
    host runs ahead of the device by at most `lag` steps.
    """

    def __init__(self, lag: int = 4):
        self._lag = lag
        self._steps: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()

    def push(self, step: int, metrics: Mapping[str, jax.Array | float]) -> None:
        """Adds the metrics of `step` and starts their copy to the host."""
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._steps.append((step, dict(metrics)))

    @property
    def newest(self) -> int | None:
        """Newest step whose metrics have not been read; None without any."""
        return self._steps[-1][0] if self._steps else None

    def ready(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Removes and yields the steps that are at least `lag` steps old, oldest first."""
        yield from self._pop(self._lag)

    def drain(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Removes and yields all steps, oldest first; waits for the device."""
        yield from self._pop(0)

    def _pop(self, keep: int) -> Iterator[tuple[int, dict[str, Any]]]:
        while len(self._steps) > keep:
            step, metrics = self._steps.popleft()
            values = jax.device_get(metrics)
            yield step, {name: np.asarray(value).tolist() for name, value in values.items()}


class Window:
    """Metrics of the steps since the last line."""

    def __init__(self, steps: list[dict[str, Any]] | None = None):
        self.steps = list(steps or [])
        """Metrics of each step as JSON values. They are saved with each training state, so that a
        resumed run writes the same lines as an uninterrupted one."""

    def add(self, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)

    def close(self) -> dict[str, Any]:
        """Empties the window and returns one value for each metric.

        The value is the sum, the last value or the mean, by the metric's aggregation. A mean is
        over the steps with a finite value: None, or NaN within a list, if there are none.
        """
        names = dict.fromkeys(name for step in self.steps for name in step)
        summary = {}
        for name in names:
            values = [step[name] for step in self.steps if name in step]
            match metric_semantics(name).aggregation:
                case "last":
                    summary[name] = values[-1]
                case "sum":
                    summary[name] = sum(values)
                case "mean":
                    summary[name] = _finite_mean(np.array(values, np.float64))
        self.steps = []
        return summary


def _finite_mean(values: np.ndarray) -> Any:
    """Mean of the finite values over the first axis."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    mean = np.where(finite, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    if values.ndim == 1:
        return mean.item() if count else None
    return np.where(count > 0, mean, np.nan).tolist()


def training_losses(lines: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Training loss of each adapter in its last line; None if that was not finite."""
    losses: dict[str, float | None] = {}
    for line in lines:
        fields = ((*name.partition("/"), value) for name, value in line.items())
        losses |= {adapter: value for adapter, _, kind, value in fields if kind == "loss"}
    return losses


def skipped_steps(lines: Sequence[Mapping[str, Any]], adapter: str) -> int:
    """Steps of an adapter, up to its last line, whose gradients were not finite."""
    counts = (line[key] for line in lines if (key := f"{adapter}/skipped_total") in line)
    return int(max(counts, default=0))


def finite_or_none(value: Any) -> Any:
    """Replaces numbers that are not finite, which JSON lacks, by None, also within lists."""
    if isinstance(value, list):
        return [finite_or_none(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def last_validation_metrics(
    lines: Sequence[Mapping[str, Any]], adapter: str, data_set: str
) -> dict[str, float | None]:
    """Metrics of a classifier, without its loss, in the last line that has its validation loss."""
    label = f"validation/{adapter}/{data_set}"
    for line in reversed(lines):
        if f"{label}/loss" in line:
            fields = ((*name.rpartition("/"), value) for name, value in line.items())
            return {m: value for prefix, _, m, value in fields if prefix == label and m != "loss"}
    return {}


def last_task_scores(
    lines: Sequence[Mapping[str, Any]], adapter: str
) -> tuple[int | None, dict[str, dict[str, float]]]:
    """Step and task scores, by task and measure, of an adapter's last evaluation on tasks."""
    prefix = f"evaluation/{adapter}/"
    for line in reversed(lines):
        scores = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        if scores:
            return line["step"], nested_by_task(scores)
    return None, {}


def nested_by_task(scores: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """Values by `task/measure` as values by task and measure."""
    tasks: dict[str, dict[str, _T]] = {}
    for key, score in scores.items():
        task, _, measure = key.rpartition("/")
        tasks.setdefault(task, {})[measure] = score
    return tasks


class Writer(Protocol):
    """Destination of lines of metrics."""

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """Writes one line: metrics by name, and under `time` a mapping of times."""
        ...

    def close(self) -> None: ...


def open_writers(
    workdir: Path,
    config: LoggingConfig,
    settings: dict[str, Any],
    resume_step: int,
    opened: contextlib.ExitStack,
) -> list[Writer]:
    """Opens the writers of `config` besides `metrics.jsonl`; removes steps after `resume_step`.

    Args:
      workdir: work directory of the run.
      config: writers to open.
      settings: configuration of the run as JSON values, for services that show it.
      resume_step: last step that is kept; -1 for a new run.
      opened: closes the writers when it is closed.

    Raises:
      ConfigError: W&B cannot be used.
      CheckpointError: a file cannot be written.
    """
    writers: list[Writer] = []

    def add(writer: Writer) -> None:
        opened.callback(writer.close)
        writers.append(writer)

    if config.wandb_project is not None:
        add(WeightsAndBiases(workdir, config.wandb_project, settings))
    if config.tensorboard:
        add(TensorBoard(workdir / "tensorboard", resume_step))
    return writers


def require_writers(config: LoggingConfig) -> None:
    """Raises `ConfigError` if a package that `config` needs is not installed."""
    if config.tensorboard:
        _import("tensorboardX", "config.logging.tensorboard", "tensorboard")
    if config.wandb_project is not None:
        _import("wandb", "config.logging.wandb_project", "wandb")


class TensorBoard:
    """Writer of event files for TensorBoard, through tensorboardX."""

    def __init__(self, folder: Path, resume_step: int):
        module = _import("tensorboardX", "config.logging.tensorboard", "tensorboard")
        purge = resume_step + 1 if resume_step > 0 else None
        self._folder = folder
        with disk_errors(folder):
            self._writer = module.SummaryWriter(str(folder), purge_step=purge)

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        with disk_errors(self._folder):
            for name, value in _flat(line).items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        with disk_errors(self._folder):
            self._writer.close()


class WeightsAndBiases:
    """Writer to a W&B run. Its id is kept in the work directory, so that resuming continues it."""

    def __init__(self, workdir: Path, project: str, settings: dict[str, Any]):
        wandb = _import("wandb", "config.logging.wandb_project", "wandb")
        file = workdir / "wandb_id"
        with disk_errors(file):
            run_id = file.read_text().strip() if file.exists() else None
        try:
            self._run = wandb.init(
                project=project, id=run_id, resume="allow", dir=str(workdir), config=settings
            )
        except Exception as error:  # of wandb, and of the libraries that it connects with
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"config.logging.wandb_project: W&B does not start ({reason[0]}); log in with "
                "`wandb login`, record for later with WANDB_MODE=offline, or leave it out"
            ) from error
        with disk_errors(file):
            file.write_text(self._run.id + "\n")

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        self._run.log(_flat(line), step=step)

    def close(self) -> None:
        self._run.finish()


def _flat(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line as scalars.

    Rows of routing metrics are named by site and layer, columns by expert:
    `moe.ADAPTER.experts.0/load/mlp/moe/3` in layer 3, `ADAPTER/layer_entropy/mlp/moe/3`.
    """
    scalars: dict[str, float] = {}
    for name, value in line.items():
        adapter, _, kind = name.rpartition("/")
        if name == TIME:
            scalars |= {f"{TIME}/{k}": float(v) for k, v in value.items()}
        elif kind == "sites" or value is None:
            continue
        elif not isinstance(value, list):
            scalars[name] = float(value)
        else:
            places = row_locations(line[f"{adapter}/sites"], len(value))
            for row, (site, layer) in zip(value, places, strict=True):
                place = f"{site}/{layer}"
                if kind == "expert_load":
                    experts = [expert_name(adapter, index) for index in range(len(row))]
                    named = {f"{e}/load/{place}": v for e, v in zip(experts, row, strict=True)}
                else:
                    named = {f"{name}/{place}": row}
                scalars |= {k: float(v) for k, v in named.items() if v is not None}
    return scalars


def _import(package: str, field: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"{field}: needs the package {package}, which is not installed; "
            f"install this package with its extra: pip install -e '.[{extra}]'"
        ) from None
