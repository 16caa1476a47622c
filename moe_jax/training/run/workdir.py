"""The folder of one run: who uses it, which configuration made it, where its parts are."""

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

MAY_CHANGE = (
    "mesh.*",
    "logging.*",
    "checkpoints.*",
    "compute.attention",
    "compute.block_tokens",
    "compute.remat",
    "training.log_every",
    "training.eval_every",
    "training.max_skipped_steps",
    "training.max_batch_rows",
    "base.path",  # the base is known by its content
    "base.revision",
    "base.hf_config*",
    "adapters.*.data.*.*.path",  # so are the data sets
    "adapters.*.data.*.*.revision",
    "tasks_folder",
    "adapters.*.evaluation*",
    "adapters.*.data.num_workers",
    "adapters.*.data.cache_dir",
)
"""Fields that a resumed run may give another value: none of them changes what is learned, beyond
the rounding that another mesh, kernel or recomputation brings."""


class WorkDir:
    """A run's folder, locked while entered so that no second run writes to it.

    If it was not there before and nothing was written to it, as where a configuration is refused,
    it is gone again when left.
    """

    def __init__(self, folder: Path):
        self.folder = folder.expanduser().absolute()
        self.checkpoints = self.folder / "checkpoints"
        self.adapters = self.folder / "adapters"
        self.best = self.folder / "best"
        self._lock: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        if is_main_process():
            folders = [self.folder, *self.folder.parents]
            with disk_errors(self.folder):
                self._made = list(itertools.takewhile(lambda each: not each.exists(), folders))
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(self._lock).st_nlink:  # removed by another run, as of no use
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
            os.close(self._lock)  # which unlocks, as the end of the process does in any case

    def _remove_if_unused(self) -> None:
        files = list(self.folder.iterdir())
        if self._made and all(file.is_file() and not file.stat().st_size for file in files):
            for file in files:
                file.unlink()
            for folder in self._made:
                folder.rmdir()

    def former_settings(self) -> dict[str, Any] | None:
        """The configuration that made this folder, or None if there is none.

        Raises:
          ConfigError: the file is not readable.
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
        """Records the configuration that this run goes by."""
        file = self.folder / CONFIG_FILE
        if is_main_process():
            write_atomic(file, json.dumps(settings, indent=2) + "\n")

    def exported_step(self, name: str) -> int | None:
        """After which step the final folder of adapter `name` was written; None if it is not."""
        folder = current_folder(self.adapters / name)
        return read_description(folder).step if (folder / DESCRIPTION).exists() else None


def is_main_process() -> bool:
    """Whether this is the one process that writes files; does not start JAX's devices by itself."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _with_new_fields(former: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of an earlier version, with the defaults of fields that it did not know."""
    try:
        return json.loads(to_json(parse_run_config(former, METHODS)))
    except ConfigError:  # of a field that there is no more, which will differ
        return former


def require_same_run(
    former: Mapping[str, Any], config: RunConfig, settings: Mapping[str, Any], folder: Path
) -> None:
    """Refuses to resume a run under a configuration that would make it another run.

    Args:
      former: the configuration in the work directory, plain JSON values.
      config: the configuration now.
      settings: `config` as plain JSON values.
      folder: the work directory, for the message.

    Raises:
      ConfigError: names the fields that differ, with both values.
    """
    allowed = MAY_CHANGE + changeable_lengths(config)
    before, now = flat_fields(_with_new_fields(former)), flat_fields(settings)
    missing = object()
    changed = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name, missing) != now.get(name, missing)
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


def changeable_lengths(config: RunConfig) -> tuple[str, ...]:
    """The fields of lengths that may change too, as the learning rate of a step stays the same.

    That is so where it does not depend on the number of steps: with a constant schedule.
    """
    groups: dict[str, bool] = {}
    for name, adapter in config.adapters.items():
        schedule = adapter.optimizer.schedule
        free = schedule.kind == "constant" and schedule.warmup_ratio is None
        group, _ = config.length_group(name)
        for each in {group, f"adapters.{name}"}:
            groups[each] = groups.get(each, True) and free
    return tuple(
        f"{group}.{field}"
        for group, free in groups.items()
        for field in ("steps", "epochs")
        if free
    )


def lengths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of nested settings that say how long adapters train."""
    groups = {"training": settings.get("training", {})}
    groups |= {f"adapters.{name}": own for name, own in settings.get("adapters", {}).items()}
    return {
        f"{group}.{field}": fields.get(field)
        for group, fields in groups.items()
        for field in ("steps", "epochs")
    }


def flat_fields(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested settings by their dotted path; lists and empty groups are values."""
    fields = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            fields.update(flat_fields(value, f"{prefix}{name}."))
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def _show(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"
