"""Metrics on their way from the device to `metrics.jsonl`, TensorBoard and Weights & Biases."""

import collections
import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from moe_jax.adapters.tree import expert_name
from moe_jax.config.run import LoggingConfig
from moe_jax.errors import ConfigError
from moe_jax.files.atomic import write_atomic
from moe_jax.files.disk import disk_errors
from moe_jax.training.step.router_metrics import row_places

METRICS_FILE = "metrics.jsonl"
TIME = "time"
"""The one field of a line that depends on the clock; the rest is the same on every run."""

_LAST_VALUE = ("loss_scale", "skipped_in_a_row", "skipped_total")
_SUM = ("sequences", "target_tokens", "tokens")


class PendingMetrics:
    """Metrics of the newest steps, which the device may still be computing.

    Reading a value waits for its step. Only values that are `lag` steps old are read, so the host
    stays ahead of the device, but never by more than `lag` steps.
    """

    def __init__(self, lag: int = 4):
        self._lag = lag
        self._steps: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()

    def push(self, step: int, metrics: Mapping[str, jax.Array | float]) -> None:
        """Takes the metrics of `step` as the device will deliver them."""
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._steps.append((step, dict(metrics)))

    @property
    def newest(self) -> int | None:
        """The last step whose metrics have not been read yet."""
        return self._steps[-1][0] if self._steps else None

    def ready(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Removes and yields the steps that are old enough, oldest first."""
        yield from self._pop(self._lag)

    def drain(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Removes and yields all of them; waits for the device."""
        yield from self._pop(0)

    def _pop(self, keep: int) -> Iterator[tuple[int, dict[str, Any]]]:
        while len(self._steps) > keep:
            step, metrics = self._steps.popleft()
            values = jax.device_get(metrics)
            yield step, {name: np.asarray(value).tolist() for name, value in values.items()}


class Window:
    """The steps since the last line of metrics."""

    def __init__(self, steps: list[dict[str, Any]] | None = None):
        self.steps = list(steps or [])
        """One dict a step; plain JSON values, saved with a checkpoint so that a resumed run writes
        the same line as one that was never interrupted."""

    def add(self, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)

    def close(self) -> dict[str, Any]:
        """One value per metric over the window, which is empty afterwards.

        Counts of tokens and of sequences are summed, loss scale and counters are those of the last
        step, and all else is the mean over the steps where it is finite (None, or NaN within a
        list, if it never is).
        """
        names = dict.fromkeys(name for step in self.steps for name in step)
        summary = {}
        for name in names:
            values = [step[name] for step in self.steps if name in step]
            kind = name.rpartition("/")[2]
            if kind in _LAST_VALUE:
                summary[name] = values[-1]
            elif kind in _SUM:
                summary[name] = sum(values)
            else:
                summary[name] = _finite_mean(np.array(values, np.float64))
        self.steps = []
        return summary


def _finite_mean(values: np.ndarray) -> Any:
    """The mean over the first axis of what is finite, number by number."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    mean = np.where(finite, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    if values.ndim == 1:
        return mean.item() if count else None
    return np.where(count > 0, mean, np.nan).tolist()


class Writer(Protocol):
    """Somewhere that lines of metrics go."""

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        """Takes one line: metrics by name, and a `time` mapping of values that depend on it."""
        ...

    def close(self) -> None: ...


def open_writers(
    workdir: Path,
    config: LoggingConfig,
    settings: dict[str, Any],
    resume_step: int,
    opened: contextlib.ExitStack,
) -> list[Writer]:
    """Opens every writer that `config` asks for; lines after `resume_step` are cut off.

    Args:
      workdir: the run's folder.
      config: which writers besides `metrics.jsonl`.
      settings: the run's configuration as plain JSON values, for the services that show it.
      resume_step: the last step that counts; -1 for a new run.
      opened: closes them when it is closed itself.

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
    add(JsonLines(workdir / METRICS_FILE, resume_step))
    return writers


def require_writers(config: LoggingConfig) -> None:
    """Raises `ConfigError` if a package that `config` needs is not installed."""
    if config.tensorboard:
        _import("tensorboardX", "config.logging.tensorboard", "tensorboard")
    if config.wandb_project is not None:
        _import("wandb", "config.logging.wandb_project", "wandb")


class JsonLines:
    """One JSON object a line: `step`, the metrics, and `time`."""

    def __init__(self, file: Path, resume_step: int):
        self._file = file
        with disk_errors(file):
            _keep_until(file, resume_step)
            self._stream = file.open("a")

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        with disk_errors(self._file):
            self._stream.write(json.dumps({"step": step, **line}) + "\n")
            self._stream.flush()

    def close(self) -> None:
        with disk_errors(self._file):
            self._stream.close()


class TensorBoard:
    """Event files for TensorBoard, written by tensorboardX."""

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
    """A W&B run; its id is kept in the work directory, so that a resumed run continues it."""

    def __init__(self, workdir: Path, project: str, settings: dict[str, Any]):
        wandb = _import("wandb", "config.logging.wandb_project", "wandb")
        file = workdir / "wandb_id"
        with disk_errors(file):
            run_id = file.read_text().strip() if file.exists() else None
        try:
            self._run = wandb.init(
                project=project, id=run_id, resume="allow", dir=str(workdir), config=settings
            )
        except Exception as error:  # its own, and those of the libraries that it connects with
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
    """The numbers of a line, each under a name of its own.

    Rows of routers are named by site and layer, columns by the expert:
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
            places = row_places(line[f"{adapter}/sites"], len(value))
            for row, (site, layer) in zip(value, places, strict=True):
                place = f"{site}/{layer}"
                if kind == "expert_load":
                    experts = [expert_name(adapter, index) for index in range(len(row))]
                    named = {f"{e}/load/{place}": v for e, v in zip(experts, row, strict=True)}
                else:
                    named = {f"{name}/{place}": row}
                scalars |= {k: float(v) for k, v in named.items() if v is not None}
    return scalars


def _keep_until(file: Path, step: int) -> None:
    """Removes lines of later steps, and a last line that was cut off by the end of its process."""
    if not file.exists():
        return
    kept = []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] <= step:
            kept.append(text + "\n")
    write_atomic(file, "".join(kept))


def _import(package: str, field: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"{field}: needs the package {package}, which is not installed; "
            f"install this package with its extra: pip install -e '.[{extra}]'"
        ) from None
