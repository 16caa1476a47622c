"""What is on record of how an adapter was trained, beside its weights: `training.json`, pictures.

Both are for people and for model cards; nothing that an adapter computes depends on them, and an
adapter that was not trained here has neither. They hold no times, so that a run that was resumed
leaves what one leaves that never stopped.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.config.parse import parse
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.files.atomic import write_atomic

RECORD_VERSION = 3
RECORD = "training.json"

_ADDED = {
    2: {"start_from": None, "validation_metrics": {}, "accuracies": {}, "accuracies_step": None},
    3: {"packing": "none"},
}
"""The fields that a version added, and what stands for them in a record of a version before."""

PICTURES = {"loss.png": "Losses", "experts.png": "Load of the experts"}
"""The files of pictures that may lie beside an adapter's weights, and what they show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that an adapter learned from or was measured on.

    Attributes:
      path, schema, split, revision: see `SourceConfig`.
      task: the evaluation task whose questions these are; None if they are none of a task.
      on_hub: whether `path` is the id of a hub data set, and not a file or folder.
      weight: its share of the rows, relative to the other training sets.
      rows: how many of its rows were used.
    """

    path: str
    on_hub: bool
    schema: str
    task: str | None
    split: str
    revision: str | None
    weight: float
    rows: int

    def renamed(self) -> "DataSet":
        """The same with the last name of a file or folder only."""
        return dataclasses.replace(self, path=Path(self.path).name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How an adapter was trained.

    Attributes:
      package_version: the release that trained it.
      adapter: its name in the run.
      method: its method's fields, and the method's `name`.
      base: `path`, `revision` and `param_dtype` of the base in the run.
      compute_dtype: see `ComputeConfig.dtype`.
      optimizer: the fields of `OptimizerConfig`.
      batch_size: rows in one optimiser step.
      micro_batches: parts that each batch was cut into.
      max_length: tokens of a row, at most.
      packing: what a row of a batch held, see `DataConfig.packing`.
      train_on_prompt: whether the prompt's tokens counted in the loss.
      seed: of its initialisation and of the order of its rows.
      start_from: the folder of the adapter that it began from; None if it began fresh, or in a
        record of version 1, which did not say.
      step: the optimiser step after which these weights were saved.
      total_steps: how many it was to make.
      train, validation: its data sets, by the name that the run gave them.
      training_loss: of the last line of metrics up to `step`, in nats per target token, or per row
        that is classified; of a number, the mean squared error. None if there is none, or it was
        not finite.
      validation_losses: at `step`, by data set, in the same unit; None as above.
      validation_metrics: of a classifier, by data set and name, measured with those losses.
      best_loss: the lowest mean validation loss up to `step`; None if the run did not keep it.
      accuracies: on evaluation tasks, by task and measure, those that were measured last.
      accuracies_step: the step after which they were; None if there are none.
    """

    package_version: str
    adapter: str
    method: dict[str, Any]
    base: dict[str, Any]
    compute_dtype: str
    optimizer: dict[str, Any]
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
    accuracies: dict[str, dict[str, float]]
    accuracies_step: int | None

    def to_give_away(self, base: str) -> "TrainingRecord":
        """The same without the places where files and folders lie, which concern nobody else.

        Args:
          base: what the base is called instead.
        """
        named = [
            {name: each if each.on_hub else each.renamed() for name, each in sets.items()}
            for sets in (self.train, self.validation)
        ]
        own = {**self.base, "path": base}
        start = None if self.start_from is None else Path(self.start_from).name
        return dataclasses.replace(
            self, base=own, start_from=start, train=named[0], validation=named[1]
        )


def write_record(
    folder: Path, record: TrainingRecord | None, pictures: Mapping[str, bytes]
) -> None:
    """Writes what there is into an adapter's folder.

    Raises:
      OSError: the disk's own.
    """
    if record is not None:
        (folder / RECORD).write_text(_text(record), encoding="utf-8")
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)


def _text(record: TrainingRecord) -> str:
    content = {"record_version": RECORD_VERSION, **dataclasses.asdict(record)}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def add_accuracies(folder: Path, step: int, accuracies: Mapping[str, Mapping[str, float]]) -> None:
    """Puts on record how an adapter that was saved before does on evaluation tasks.

    Args:
      folder: the adapter's, with its record.
      step: after which it was measured.
      accuracies: by task and measure.

    Raises:
      CheckpointError: the record is damaged, or the disk is full or not writable.
    """
    record = read_record(folder)
    if record is None:  # deleted by hand
        return
    measured = {task: dict(own) for task, own in accuracies.items()}
    former, record = record, dataclasses.replace(record, accuracies=measured, accuracies_step=step)
    if record == former:  # of a run that was stopped before it had all its results
        return
    write_atomic(folder / RECORD, _text(record))


def read_record(folder: Path) -> TrainingRecord | None:
    """The record of an adapter's folder; None if it has none.

    Raises:
      CheckpointError: it is of another version, or damaged.
    """
    file = folder / RECORD
    without = "delete the file to use the adapter without it"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {without}") from None
    version = content.pop("record_version", None) if isinstance(content, dict) else None
    if type(version) is not int or not 1 <= version <= RECORD_VERSION:
        raise CheckpointError(
            f"{file}: record version {version!r}, this release reads 1 to {RECORD_VERSION}; "
            f"{without}"
        )
    for added, fields in _ADDED.items():
        if version < added:
            content = {**fields, **content}
    try:
        return parse(TrainingRecord, content, str(file))
    except ConfigError as error:
        raise CheckpointError(f"{error}; the file was changed or is damaged; {without}") from None


def read_pictures(folder: Path) -> dict[str, bytes]:
    """The pictures of an adapter's folder, by file name.

    Raises:
      CheckpointError: one of them cannot be read.
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
