"""Adapters by path, also those of a training run that has not finished.

A path names the folder of an adapter, a hub id, the work directory of a run, or one of its training
states (`WORKDIR/checkpoints/STEP`). An adapter that has not finished is taken from a training state
and written to `WORKDIR/stopped/NAME`, in the same format as a finished one. `WORKDIR/adapters` and
`WORKDIR/stopped` stand for the work directory.
"""

import contextlib
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import (
    DESCRIPTION,
    SavedAdapter,
    read_description,
    save_adapter,
)
from moe_jax.checkpoints.leaves import nested_dict
from moe_jax.checkpoints.store import newest_intact_step, read_adapters, read_metadata
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.data.new_tokens import with_token_id
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.files.folders import current_folder
from moe_jax.files.json_file import parse_json
from moe_jax.hf import base_model
from moe_jax.hf.base_model import BaseIdentity, open_base
from moe_jax.loaded.adapter_base import expected_leaves
from moe_jax.loaded.rank_match import match_ranks
from moe_jax.terminal import print_shown

CHECKPOINTS, ADAPTERS, STOPPED = "checkpoints", "adapters", "stopped"
_CONFIG = "config.json"


def resolve_adapter(path: str | Path, revision: str | None = None) -> Path:
    """Local folder of the adapter that a path names.

    Args:
      path: see the module's docstring. Of a run with several adapters, `WORKDIR/adapters/NAME`
        names one, whether it has finished or not.
      revision: revision of a hub id.

    Raises:
      CheckpointError: a hub id cannot be downloaded; a run has several adapters, or nothing to load
        yet; a training state is damaged.
    """
    given = Path(path).expanduser()
    for workdir, name, step in _run_paths(given):
        if is_workdir(workdir) and not (current_folder(given) / DESCRIPTION).exists():
            return _folder_of_run(workdir, name, step)
    return base_model.resolve_adapter(path, revision)


def is_workdir(folder: Path) -> bool:
    """True if a folder is the work directory of a run, and not a model or an adapter."""
    return (folder / _CONFIG).is_file() and (
        (folder / CHECKPOINTS).is_dir() or (folder / ADAPTERS).is_dir()
    )


def read_run_config(workdir: Path) -> RunConfig:
    """Configuration of a run.

    Raises:
      CheckpointError: the file is damaged.
    """
    file = workdir / _CONFIG
    try:
        return parse_run_config(parse_json(file.read_bytes()), METHODS)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} is not the configuration of a run ({error})") from None


def _run_paths(path: Path) -> list[tuple[Path, str | None, int | None]]:
    """Work directory, adapter and step that a path may name."""
    found: list[tuple[Path, str | None, int | None]] = [(path, None, None)]
    if path.name in (ADAPTERS, STOPPED):
        found.append((path.parent, None, None))
    if path.parent.name == ADAPTERS:
        found.append((path.parent.parent, path.name, None))
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        found.append((path.parent.parent, None, int(path.name)))
    return found


def _folder_of_run(workdir: Path, name: str | None, step: int | None) -> Path:
    config = read_run_config(workdir)
    if name is None:
        if len(config.adapters) > 1:
            raise CheckpointError(
                f"{workdir}: the run has several adapters; give one of them: "
                + ", ".join(str(workdir / ADAPTERS / name) for name in config.adapters)
            )
        (name,) = config.adapters
    elif name not in config.adapters:
        raise CheckpointError(
            f"{workdir}: the run has no adapter {name!r}, but {', '.join(config.adapters)}"
        )
    finished = current_folder(workdir / ADAPTERS / name)
    if step is None and (finished / DESCRIPTION).exists():
        return finished
    states = workdir / CHECKPOINTS
    if step is None:
        step, damage = newest_intact_step(states, ("adapters", "metadata"))
        for number, what in damage.items():
            _say_once(f"{states / str(number)} is damaged ({what})")
        if step is None and damage:
            raise CheckpointError(f"{states}: no training state is intact; copy one from a backup")
    if step is None:
        raise CheckpointError(
            f"{workdir}: the run has saved no training state yet; wait for the first one, or lower "
            "config.checkpoints.every"
        )
    _say_once(f"{workdir}: adapter {name!r} has not finished; taken at step {step}")
    return _stopped_adapter(workdir, config, name, step)


@functools.cache
def _say_once(line: str) -> None:
    """Prints a line, once in a process: a command may resolve a path several times."""
    print_shown(line, file=sys.stderr)


def _stopped_adapter(workdir: Path, config: RunConfig, name: str, step: int) -> Path:
    """Folder of an adapter as it is in a training state, written unless it holds it already."""
    folder, states = workdir / STOPPED / name, workdir / CHECKPOINTS
    metadata = read_metadata(states, step)
    if (current_folder(folder) / DESCRIPTION).exists():
        sums, prefix = metadata["checksums"]["adapters"], f"{name}/"
        of_state = {p.removeprefix(prefix): s for p, s in sums.items() if p.startswith(prefix)}
        with contextlib.suppress(CheckpointError):  # damaged: it is written again
            description = read_description(folder)
            # A run that was begun again in the same folder may have a state of the same step.
            if (description.step, description.checksums) == (step, of_state):
                return current_folder(folder)
    identity = BaseIdentity(**metadata["base"])
    base = open_base(config.base.path, config.base.revision)
    base.require_trained_on(str(workdir), identity, "restore that base")
    matched = match_ranks(config.methods, base.config).methods
    names = [other for other, steps in metadata["steps"].items() if steps >= step]
    if name not in names:
        raise CheckpointError(
            f"{states / str(step)}: no longer holds the adapter {name!r}, which had finished; give "
            f"{workdir / ADAPTERS / name}"
        )
    methods = {other: with_token_id(matched[other], base) for other in names}
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        other: nested_dict(
            {
                leaf: jax.ShapeDtypeStruct(*spec, sharding=device)
                for leaf, spec in expected_leaves(base.config, methods[other]).items()
            }
        )
        for other in names
    }
    tree: Mapping[str, Any] = read_adapters(states, step, target)
    save_adapter(folder, SavedAdapter(methods[name], tree[name], base.config, identity, step))
    return current_folder(folder)
