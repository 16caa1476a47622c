"""Work directory of a run: its lock, its folders, and the configuration that it belongs to."""

import contextlib
import fcntl
import fnmatch
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import DESCRIPTION, read_description
from moe_jax.checkpoints.store import newest_intact_step, set_aside
from moe_jax.config.run import RunConfig, parse_run_config, to_json
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.files.atomic import write_atomic
from moe_jax.files.disk import disk_errors
from moe_jax.files.folders import current_folder
from moe_jax.files.json_file import read_json_object
from moe_jax.processes.agreement import code_versions, require_agreement, value_of_first
from moe_jax.terminal import first_of

CONFIG_FILE = "config.json"
_LOCK = ".lock"
_SHARED_SECONDS = 30.0  # for network file systems, which keep their view for some time

RESUMABLE_FIELDS = (
    "mesh.*",
    "logging.*",
    "checkpoints.*",
    "compute.attention",
    "compute.experts",
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


_PLACES = (
    "base.path",
    "adapters.*.data.*.*.path",
    "adapters.*.data.cache_dir",
    "adapters.*.data.num_workers",
    "adapters.*.start_from",
    "tasks_folder",
)
"""Fields that may differ between processes, whose machines may keep files in different places."""


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
        self._number = uuid.uuid4().hex
        self._is_claimed = False
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_in_place = self._is_in_place()
        if self._lock is not None:
            with contextlib.suppress(OSError):
                if os.fstat(self._lock).st_size:  # some file systems count every cut as a change
                    os.ftruncate(self._lock, 0)
                if is_in_place:
                    self._remove_if_unused()
            os.close(self._lock)  # which unlocks it, as the end of the process does
            self._lock = None
        # Then a library did not find its files, whatever its error is.
        if isinstance(error, Exception) and not is_in_place:
            raise self._removal() from error

    def claim(self) -> None:
        """Writes a number into the lock file, which another run's has not at the same path.

        Raises:
          CheckpointError: it cannot be written.
        """
        if self._lock is not None and not self._is_claimed:
            with disk_errors(self.folder / _LOCK):
                os.pwrite(self._lock, self._number.encode(), 0)
                os.fsync(self._lock)
            self._is_claimed = True

    def require_in_place(self) -> None:
        """Requires that this is still the folder that was locked, before something is written.

        A library would create a folder that was removed again, with a part of its files.

        Raises:
          CheckpointError: it was removed or renamed.
        """
        if not self._is_in_place():
            raise self._removal()

    def _is_in_place(self) -> bool:
        # Not by inodes, which some network file systems change.
        if self._is_claimed:
            return self._sees(self._number)
        return self._lock is None or os.path.exists(self.folder / _LOCK)

    def _removal(self) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} was removed or renamed while the run used it (its {_LOCK} is gone, or "
            "another run's); put it back and run the same command again, or give another --workdir"
        )

    def _remove_if_unused(self) -> None:
        files = list(self.folder.iterdir())
        if self._created and all(file.is_file() and not file.stat().st_size for file in files):
            for file in files:
                file.unlink()
            for folder in self._created:
                folder.rmdir()

    def require_shared(self, say: Callable[[str], None]) -> None:
        """Requires that this process sees the work directory of process 0, which has locked it.

        The others must read the number that process 0 writes into the lock file: another folder
        may have the same path on their machines.

        Raises:
          ConfigError: it does not.
        """
        if jax.process_count() == 1:
            return
        self.claim()
        number = value_of_first(self._number, say)
        deadline = time.monotonic() + _SHARED_SECONDS
        while not self._sees(number):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self.folder}: process {jax.process_index()} does not see this work "
                    "directory of process 0; give one on a file system that all processes share"
                )
            time.sleep(0.5)

    def _sees(self, number: str) -> bool:
        try:
            return (self.folder / _LOCK).read_text(encoding="utf-8", errors="replace") == number
        except OSError:
            return False

    def former_settings(self) -> dict[str, Any] | None:
        """Configuration of the run that created this folder; None without one.

        Raises:
          ConfigError: the file cannot be read.
        """
        file = self.folder / CONFIG_FILE
        if not file.exists():
            return None
        try:
            return read_json_object(file, "give another --workdir, or delete this one")
        except CheckpointError as error:
            raise ConfigError(str(error)) from None

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
        differences = [
            f"config.{name} was {_show(before, name)}, is {_show(now, name)}" for name in changed
        ]
        raise ConfigError(
            f"{folder} was made by another configuration: {first_of(differences)}; give another "
            "--workdir, or the former values to resume"
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


def require_same_start(config: RunConfig, work: WorkDir, say: Callable[[str], None]) -> None:
    """Requires that all processes have the same code, configuration and work directory.

    Raises:
      ConfigError: they differ, or a process does not see the work directory of process 0.
    """
    fields = {
        f"config.{name}": value
        for name, value in flat_fields(json.loads(to_json(config))).items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in _PLACES)
    }
    require_agreement({**code_versions(), **fields}, say)
    work.require_shared(say)


def intact_step(folder: Path, say: Callable[[str], None], *, fall_back: bool) -> int | None:
    """Newest intact training state; damaged newer ones are set aside. The same in all processes."""
    step = None
    if is_main_process():
        step, damage = newest_intact_step(folder)
        if damage:
            newest = max(damage)
            what = f"{folder / str(newest)} is damaged ({damage[newest]})"
            if step is None:
                raise CheckpointError(
                    f"{what}, and no earlier state is intact; copy it from a backup, or delete "
                    f"{folder} to train from the start"
                )
            if not fall_back:
                raise CheckpointError(
                    f"{what}; copy it from a backup, or set config.checkpoints.fall_back to resume "
                    f"from step {step}"
                )
            aside = [str(set_aside(folder, number)) for number in damage]
            say(f"{what}; resuming from step {step}; it is kept as {', '.join(aside)}")
    return value_of_first(step, say)
