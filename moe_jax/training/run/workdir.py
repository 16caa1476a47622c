"""Work directory of a run: its lock, its folders, and the configuration that it belongs to."""

import contextlib
import fcntl
import fnmatch
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import DESCRIPTION, read_description
from moe_jax.config.run import RunConfig, parse_run_config, to_json
from moe_jax.errors import ConfigError
from moe_jax.files.atomic import write_atomic
from moe_jax.files.disk import disk_errors
from moe_jax.files.folders import current_folder

CONFIG_FILE = "config.json"
_LOCK = ".lock"

RESUMABLE_FIELDS = (
    "mesh.*",
    "logging.*",
    "checkpoints.*",
    "compute.attention",
    "compute.remat",
    "training.log_every",
    "training.eval_every",
    "training.max_skipped_steps",
    "training.max_batch_rows",
    "base.path",  # the base is identified by its content
    "base.revision",
    "base.hf_config*",
    "adapters.*.data.*.*.path",  # so are the data sets
    "adapters.*.data.*.*.revision",
    "tasks_folder",
    "adapters.*.evaluation*",
    "adapters.*.data.num_workers",
    "adapters.*.data.cache_dir",
)
"""Fields that may differ in a resumed run: none changes the adapters, except for the rounding of
another mesh, kernel or rematerialization."""


class WorkDir:
    """Work directory, locked while the context is entered so that no second run writes to it.

    A folder that was created on entry and is empty on exit, as after an invalid configuration, is
    removed.

    Attributes:
      folder: absolute path of the work directory.
      checkpoints: folder of the training states.
      adapters: parent of the adapters' final folders.
      best: parent of the adapters' folders at their lowest validation loss.
    """

    def __init__(self, folder: Path, config_file: str | None = None):
        self._config_file = config_file
        self.folder = folder.expanduser().absolute()
        self.checkpoints = self.folder / "checkpoints"
        self.adapters = self.folder / "adapters"
        self.best = self.folder / "best"
        self._lock: int | None = None
        self._created: list[Path] = []

    def __enter__(self) -> Self:
        if is_main_process():
            folders = [self.folder, *self.folder.parents]
            with disk_errors(self.folder):
                self._created = list(
                    itertools.takewhile(lambda folder: not folder.exists(), folders)
                )
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(self._lock).st_nlink:  # another run has removed the empty folder
                    raise BlockingIOError
            except BlockingIOError:
                os.close(self._lock)
                raise ConfigError(
                    f"{self.folder}: another run is using this work directory; wait for it or "
                    "give another --workdir"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._remove_if_unused()
            os.close(self._lock)  # which unlocks it, as the end of the process does

    def _remove_if_unused(self) -> None:
        files = list(self.folder.iterdir())
        if self._created and all(file.is_file() and not file.stat().st_size for file in files):
            for file in files:
                file.unlink()
            for folder in self._created:
                folder.rmdir()

    def former_settings(self) -> dict[str, Any] | None:
        """Configuration of the run that created this folder; None without one.

        Raises:
          ConfigError: the file cannot be read.
        """
        file = self.folder / CONFIG_FILE
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}); give another --workdir, or delete this one"
            ) from None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the configuration of this run, and the file that it was made as."""
        if is_main_process():
            write_atomic(self.folder / CONFIG_FILE, json.dumps(settings, indent=2) + "\n")
            if self._config_file is not None:
                write_atomic(self.folder / "config.py", self._config_file)

    def exported_step(self, name: str) -> int | None:
        """Step of the final folder of an adapter; None without that folder."""
        folder = current_folder(self.adapters / name)
        return read_description(folder).step if (folder / DESCRIPTION).exists() else None


def is_main_process() -> bool:
    """True in the process that writes files; does not initialize the devices of JAX."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _with_new_fields(former: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds fields that the configuration of an earlier version lacks, with their defaults."""
    try:
        return json.loads(to_json(parse_run_config(former, METHODS)))
    except ConfigError:  # a field was removed since; the comparison reports it
        return former


def require_same_run(
    former: Mapping[str, Any],
    config: RunConfig,
    settings: Mapping[str, Any],
    folder: Path,
    step: int = 0,
) -> None:
    """Requires that a configuration differs from that of a saved run in `RESUMABLE_FIELDS` only.

    Args:
      former: configuration in the work directory, as JSON values.
      config: configuration of this run.
      settings: `config` as JSON values.
      folder: work directory, for the message.
      step: step of the training state; a number of steps may be lowered to at most that one, which
        ends the adapter.

    Raises:
      ConfigError: another field differs; names it, with both values.
    """
    allowed = RESUMABLE_FIELDS + changeable_lengths(config, step)
    before, now, absent = flat_fields(_with_new_fields(former)), flat_fields(settings), object()
    changed = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name, absent) != now.get(name, absent)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in allowed)
    ]
    if changed:
        shown = "; ".join(
            f"config.{name} was {_show(before, name)}, is {_show(now, name)}"
            for name in changed[:3]
        )
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise ConfigError(
            f"{folder} was made by another configuration: {shown}{more}; give another --workdir, "
            "or the former values to resume"
        )


def changeable_lengths(config: RunConfig, step: int) -> tuple[str, ...]:
    """Fields of numbers of steps and epochs that may differ in a run that resumes at `step`.

    They may with a constant schedule, whose learning rates do not depend on the number of steps,
    and where no step is left.
    """
    groups: dict[str, bool] = {}
    for name, adapter in config.adapters.items():
        schedule = adapter.optimizer.schedule
        is_constant = schedule.kind == "constant" and schedule.warmup_ratio is None
        of_length, length = config.length_group(name)
        ends = length.steps is not None and length.steps <= step
        for group in {of_length, f"adapters.{name}"}:
            groups[group] = groups.get(group, True) and (is_constant or ends)
    return tuple(
        f"{group}.{field}"
        for group, may_change in groups.items()
        for field in ("steps", "epochs")
        if may_change
    )


def lowered_steps(config: RunConfig, former: Mapping[str, int], step: int) -> dict[str, int]:
    """Adapters that end at the saved `step`, since their number of steps is at most that one.

    Args:
      config: configuration of this run.
      former: total steps of each adapter when the state was saved.
      step: step of the state.

    Returns:
      `step` by name.
    """
    lengths = {name: config.length_group(name)[1].steps for name in former}
    return {
        name: step
        for name, total in former.items()
        if (length := lengths[name]) is not None and length <= step <= total
    }


def step_counts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration, as JSON values, with numbers of steps and epochs."""
    groups = {"training": settings.get("training", {})}
    adapters = settings.get("adapters", {})
    groups |= {f"adapters.{name}": fields for name, fields in adapters.items()}
    return {
        f"{group}.{field}": fields.get(field)
        for group, fields in groups.items()
        for field in ("steps", "epochs")
    }


def flat_fields(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to values by dotted path; lists and empty mappings are values."""
    fields = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            fields.update(flat_fields(value, f"{prefix}{name}."))
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def _show(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"
