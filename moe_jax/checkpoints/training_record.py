"""Record of an adapter's training, beside its weights: `training.json` and pictures.

Both are for readers and model cards. The adapter's computation does not depend on them, and an
imported adapter has neither. They hold no times, so a resumed run writes the same files as an
uninterrupted one.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.config.parse import parse
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.files.atomic import write_atomic
from moe_jax.files.digests import content_digest
from moe_jax.files.json_file import parse_json

RECORD_VERSION = 5
RECORD = "training.json"

PICTURES = {
    "loss.png": "Losses",
    "rewards.png": "Rewards",
    "experts.png": "Load of the experts",
}
"""Titles of the picture files that an adapter's folder may hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set for training or validation.

    Attributes:
      path: path of the data set; several are joined by ", ".
      schema, split, revision: see `SourceConfig`.
      task: evaluation task of its questions; None if it belongs to no task.
      on_hub: True if `path` is on the hub, and not a local file or folder.
      weight: sampling weight, relative to the other training sets.
      rows: number of rows used; None for streamed data.
    """

    path: str
    on_hub: bool
    schema: str
    task: str | None
    split: str
    revision: str | None
    weight: float
    rows: int | None

    def without_local_path(self) -> "DataSet":
        """Copy whose path is the names of the files or folders only."""
        names = ", ".join(Path(path).name for path in self.path.split(", "))
        return dataclasses.replace(self, path=names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Settings and results of an adapter's training.

    Attributes:
      package_version: release that trained the adapter.
      adapter: name of the adapter in the run.
      method: fields of the method, and its `name`.
      base: `path`, `revision` and `param_dtype` of the base model.
      compute_dtype: see `ComputeConfig.dtype`.
      optimizer: fields of `OptimizerConfig`.
      preference: fields of the preference loss, and its `name`; None without one.
      batch_size: rows per optimizer step.
      micro_batches: number of parts of each batch.
      max_length: maximum number of tokens of a row.
      packing: see `DataConfig.packing`.
      train_on_prompt: True if the tokens of the prompt count in the loss.
      seed: seed of the initialization and of the order of the rows.
      start_from: folder of the initial adapter; None for a fresh adapter.
      step: optimizer step after which the weights were saved.
      total_steps: number of steps planned.
      train, validation: data sets by their names in the run.
      training_loss: loss in the last line of metrics up to `step`: nats per target token, nats per
        row for classification, mean squared error for regression, preference loss per example.
        None if missing or not finite.
      validation_losses: losses at `step` by data set, in the same unit; None as above.
      validation_metrics: metrics of a classifier or of preference training at `step`, by data set
        and name.
      best_loss: mean validation loss of the best adapter up to `step`; None if the run does not
        keep it.
      best_accuracy: its mean validation accuracy, where that chose it (`preference.keep_best`).
      accuracies: latest accuracies on evaluation tasks, by task and measure.
      accuracies_step: step of `accuracies`; None if there are none.
    """

    package_version: str
    adapter: str
    method: dict[str, Any]
    base: dict[str, Any]
    compute_dtype: str
    optimizer: dict[str, Any]
    preference: dict[str, Any] | None
    batch_size: int
    micro_batches: int
    max_length: int
    packing: str
    train_on_prompt: bool
    seed: int
    start_from: str | None
    step: int
    total_steps: int
    train: dict[str, DataSet]
    validation: dict[str, DataSet]
    training_loss: float | None
    validation_losses: dict[str, float | None]
    validation_metrics: dict[str, dict[str, float | None]]
    best_loss: float | None
    best_accuracy: float | None
    accuracies: dict[str, dict[str, float]]
    accuracies_step: int | None

    def without_local_paths(self, base: str) -> "TrainingRecord":
        """Copy without local paths, for publication.

        Args:
          base: name of the base model in place of its path.
        """
        train, validation = (
            {name: s if s.on_hub else s.without_local_path() for name, s in data_sets.items()}
            for data_sets in (self.train, self.validation)
        )
        return dataclasses.replace(
            self,
            base={**self.base, "path": base},
            start_from=None if self.start_from is None else Path(self.start_from).name,
            train=train,
            validation=validation,
        )


def write_record(
    folder: Path, record: TrainingRecord | None, pictures: Mapping[str, bytes]
) -> None:
    """Writes the record, if there is one, and the pictures into an adapter's folder.

    Raises:
      OSError: the disk is full or not writable.
    """
    if record is not None:
        (folder / RECORD).write_text(_text(record), encoding="utf-8")
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)


def _text(record: TrainingRecord) -> str:
    content = {"record_version": RECORD_VERSION, **dataclasses.asdict(record)}
    content["digest"] = content_digest(content)
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def add_accuracies(folder: Path, step: int, accuracies: Mapping[str, Mapping[str, float]]) -> None:
    """Adds accuracies on evaluation tasks to the record of a saved adapter.

    Args:
      folder: folder of the adapter.
      step: optimizer step of the evaluated weights.
      accuracies: accuracies by task and measure.

    Raises:
      CheckpointError: the record is damaged, or the disk is full or not writable.
    """
    record = read_record(folder)
    if record is None:  # deleted by hand
        return
    by_task = {task: dict(values) for task, values in accuracies.items()}
    extended = dataclasses.replace(record, accuracies=by_task, accuracies_step=step)
    if extended != record:  # equal if a stopped run is completed
        write_atomic(folder / RECORD, _text(extended))


def read_record(folder: Path) -> TrainingRecord | None:
    """Reads the record of an adapter's folder; None if it has none.

    Raises:
      CheckpointError: the record is damaged, or of another version.
    """
    file = folder / RECORD
    remedy = "delete the file to use the adapter without it"
    try:
        content = parse_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {remedy}") from None
    version = content.get("record_version") if isinstance(content, dict) else None
    if version != RECORD_VERSION:
        raise CheckpointError(
            f"{file}: record version {version!r}, this release reads {RECORD_VERSION}; {remedy}"
        )
    digest = content.pop("digest", "")
    if digest is not None and digest != content_digest(content):
        raise CheckpointError(
            f'{file}: differs from its digest; set "digest": null to keep an edit, or {remedy}'
        )
    del content["record_version"]
    try:
        return parse(TrainingRecord, content, str(file))
    except ConfigError as error:
        raise CheckpointError(f"{error}; the file was changed or is damaged; {remedy}") from None


def read_pictures(folder: Path) -> dict[str, bytes]:
    """Reads the pictures of an adapter's folder, by file name.

    Raises:
      CheckpointError: a picture cannot be read.
    """
    pictures = {}
    for name in PICTURES:
        try:
            pictures[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from None
    return pictures
