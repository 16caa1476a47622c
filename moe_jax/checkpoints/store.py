"""Training states on disk: adapters, optimizer, data position and metadata, without the base.

Each saved step has one folder, which Orbax writes in the background and renames when it is
complete: a run that is killed while saving leaves the previous step as the latest. Adapters are a
separate item, which loads without the optimizer. The digests of all files are written before the
folder is renamed, so that every complete state can be checked without a device.
"""

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from moe_jax.checkpoints.late_errors import register_folder
from moe_jax.checkpoints.leaves import Snapshot, named_leaves, nested_dict, take_snapshot
from moe_jax.checkpoints.restored_tree import restore_tree
from moe_jax.errors import CheckpointError
from moe_jax.files.digests import DIGESTS_FILE, find_damage, write_digests
from moe_jax.files.disk import disk_errors
from moe_jax.files.json_file import parse_json

STATE_FORMAT_VERSION = 2
ITEMS = ("adapters", "optimizer", "data", "metadata")


class SavedState(NamedTuple):
    """Training state of one step.

    Attributes:
      step: number of optimizer steps taken.
      adapters: `{adapter name: tree}`.
      optimizer: rest of the training state, with the structure that was saved.
      data: positions of the data iterators, as JSON values.
      metadata: identity of the base and other properties of the run, as JSON values.
    """

    step: int
    adapters: Any
    optimizer: Any
    data: dict[str, Any]
    metadata: dict[str, Any]


class CapturedState(NamedTuple):
    """Arrays of a training state at one moment, on the devices; see `capture_state`."""

    adapters: Snapshot
    optimizer: Snapshot


def capture_state(adapters: Any, optimizer: Any) -> CapturedState:
    """Copies a state on its devices without waiting; the arrays may be donated to the next step.

    Args:
      adapters: `{adapter name: tree}` of jax arrays.
      optimizer: rest of the training state: any tree of jax arrays whose nodes have names.
    """
    return CapturedState(
        take_snapshot(adapters), take_snapshot(nested_dict(named_leaves(optimizer)))
    )


class TrainingStore:
    """Training states of one run.

    Not safe for concurrent runs: the caller must hold the lock of the work directory.
    """

    def __init__(self, folder: Path, *, every: int, keep: int):
        """Opens or creates `folder`, and removes leftovers of an interrupted save.

        Args:
          folder: folder with one subfolder for each step.
          every: number of steps between saves.
          keep: number of saved steps that are kept, the newest ones.

        Raises:
          CheckpointError: `folder` cannot be created or written.
        """
        self.folder = folder.absolute()
        self._writing: int | None = None
        register_folder(self.folder)
        with disk_errors(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=ITEMS,
                options=ocp.CheckpointManagerOptions(
                    save_decision_policy=policies.FixedIntervalPolicy(every),
                    preservation_policy=policies.LatestN(keep),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                    # Called in the process that renames the folder, just before it does.
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
                    lightweight_initialize=True,  # does not read old steps, which may be damaged
                ),
            )

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """True if the state should be saved after this step."""
        return step != self.latest and self._manager.should_save(step)

    def save(
        self,
        step: int,
        *,
        adapters: Any,
        optimizer: Any,
        data: dict[str, Any],
        metadata: dict[str, Any],
    ) -> None:
        """Captures and writes a state; see `capture_state` and `write`."""
        self.write(step, capture_state(adapters, optimizer), data=data, metadata=metadata)

    def write(
        self, step: int, state: CapturedState, *, data: dict[str, Any], metadata: dict[str, Any]
    ) -> None:
        """Copies a captured state to the host and writes it in the background.

        It waits for the previous save first. A step that is already saved is not written again.

        Args:
          step: number of optimizer steps taken.
          state: captured arrays.
          data: positions of the data iterators, as JSON values.
          metadata: other properties of the run, as JSON values.

        Raises:
          TrainingError: an adapter leaf is not finite; nothing is written.
          CheckpointError: the disk is full, or this or the previous save failed otherwise.
        """
        if step == self.latest:
            return
        state.adapters.require_finite(step)
        sums = {name: snapshot.checksums() for name, snapshot in state._asdict().items()}
        header = {"format_version": STATE_FORMAT_VERSION, "step": step, "checksums": sums}
        with disk_errors(self.folder / str(step), self.kept_state()):
            self._manager.wait_until_finished()
            self._writing = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    adapters=ocp.args.StandardSave(state.adapters.tree),
                    optimizer=ocp.args.StandardSave(state.optimizer.tree),
                    data=ocp.args.JsonSave(data),
                    metadata=ocp.args.JsonSave({**header, **metadata}),
                ),
                force=True,
            )

    def _write_digests(self) -> None:
        suffix = ocp.path.atomicity.TMP_DIR_SUFFIX
        write_digests(self.folder / f"{self._writing}{suffix}", ITEMS)

    def wait(self) -> None:
        """Waits for the write in the background.

        Raises:
          CheckpointError: it failed, for example on a full disk.
        """
        with disk_errors(self.folder, self.kept_state()):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last write and releases the threads; raises as `wait` does."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:  # wait for a save that is under way, and raise the original error
            with contextlib.suppress(CheckpointError):
                self.wait()

    def restore(self, step: int, adapters: Any, optimizer: Any) -> SavedState:
        """Reads a saved step onto the devices.

        Args:
          step: saved step.
          adapters: `{adapter name: tree}` of `ShapeDtypeStruct` with shardings; the mesh may differ
            from the one that saved.
          optimizer: tree of `ShapeDtypeStruct` with shardings for the rest of the state.

        Raises:
          CheckpointError: the state is damaged, has another format version, or other leaves.
        """
        paths = named_leaves(optimizer)
        leaves = _read_item(self.folder, step, "optimizer", nested_dict(paths))
        flat = named_leaves(leaves)
        return SavedState(
            step=step,
            adapters=self.restore_adapters(step, adapters),
            optimizer=jax.tree.unflatten(
                jax.tree.structure(optimizer), [flat[path] for path in paths]
            ),
            data=_read_json(self.folder, step, "data"),
            metadata=read_metadata(self.folder, step),
        )

    def restore_adapters(self, step: int, adapters: Any) -> Any:
        """Reads the adapters of a saved step without the optimizer; see `restore`."""
        return read_adapters(self.folder, step, adapters)

    def kept_state(self) -> str:
        """Text that names the newest saved state, for messages."""
        # Read from the disk, since Orbax's list includes the step that is being written.
        step = latest_step(self.folder)
        return "no state was saved before" if step is None else f"the state at step {step} is kept"


def latest_step(folder: Path) -> int | None:
    """Newest complete step in the folder of a `TrainingStore`, or None; uses no device."""
    return max(_steps(folder), default=None)


def newest_intact_step(
    folder: Path, items: Iterable[str] = ITEMS
) -> tuple[int | None, dict[int, str]]:
    """Newest complete step whose files are as they were written; uses no device.

    Args:
      folder: folder of a `TrainingStore`.
      items: items of a state that are checked, which are read once.

    Returns:
      The step, None if there is none, and what is wrong with each newer one.
    """
    damage = {}
    for step in sorted(_steps(folder), reverse=True):
        found = _find_damage(folder / str(step), [f"{item}/" for item in items])
        if found is None:
            return step, damage
        damage[step] = found
    return None, damage


def set_aside(folder: Path, step: int) -> Path:
    """Renames a damaged state, so that none is read or counted in its place; returns its path.

    Only the run that holds the lock of the work directory may call this.
    """
    state = folder / str(step)
    aside = state.with_name(f"{step}.damaged")
    with disk_errors(aside):
        shutil.rmtree(aside, ignore_errors=True)
        state.rename(aside)
    return aside


def read_metadata(folder: Path, step: int) -> dict[str, Any]:
    """Reads the metadata of a saved step without its arrays; uses no device.

    Raises:
      CheckpointError: the file is missing or damaged, has another format version, or is of another
        step.
    """
    metadata = _read_json(folder, step, "metadata")
    if (version := metadata.get("format_version")) != STATE_FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / str(step)} has format version {version!r}, this release reads "
            f"{STATE_FORMAT_VERSION}; resume with the release that wrote it"
        )
    if metadata["step"] != step:
        raise CheckpointError(
            f"{folder / str(step)} holds the state of step {metadata['step']}; rename it back"
        )
    return metadata


def read_adapters(folder: Path, step: int, adapters: Any) -> Any:
    """Reads the adapters of a saved step; also while a run is saving to the folder.

    Args:
      folder: folder of a `TrainingStore`.
      step: saved step.
      adapters: `{adapter name: tree}` of `ShapeDtypeStruct` with shardings, all of the state's.

    Raises:
      CheckpointError: see `TrainingStore.restore`.
    """
    return _read_item(folder.absolute(), step, "adapters", adapters)


def _read_item(folder: Path, step: int, item: str, target: Any) -> Any:
    sums = read_metadata(folder, step)["checksums"][item]
    return restore_tree(folder / str(step) / item, target, sums, _advice(folder, step))


def _steps(folder: Path) -> list[int]:
    # Orbax renames a step's folder to its number when it is complete.
    return [int(child.name) for child in folder.glob("[0-9]*") if child.name.isdecimal()]


def _read_json(folder: Path, step: int, item: str) -> dict[str, Any]:
    name = f"{item}/metadata"  # Orbax's name for JSON items
    damage = _find_damage(folder / str(step), [name])
    if damage is not None:
        raise CheckpointError(
            f"{folder / str(step)} is damaged ({damage}); {_advice(folder, step)}"
        )
    return dict(parse_json((folder / str(step) / name).read_bytes()))


def _find_damage(state: Path, parts: list[str]) -> str | None:
    found = find_damage(state, parts)
    is_old = found == f"{DIGESTS_FILE} is missing"
    return f"{found}, as in states of earlier releases" if is_old else found


def _advice(folder: Path, step: int) -> str:
    older = max((other for other in _steps(folder) if other < step), default=None)
    return f"delete {folder / str(step)} to resume from " + (
        "the start" if older is None else f"step {older}"
    )
