"""Training states on disk: adapters, optimiser, data position and metadata, never the base.

One folder per saved step, written by Orbax in the background and renamed when complete, so that a
run that dies while saving leaves the previous step as the latest. Adapters are an item of their
own: they load without the optimiser.
"""

import contextlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from moe_jax.checkpoints.late_errors import register_folder
from moe_jax.checkpoints.leaves import Snapshot, named_leaves, nested, take_snapshot
from moe_jax.checkpoints.restored_tree import first_line, restore_tree
from moe_jax.errors import CheckpointError
from moe_jax.files.disk import disk_errors

FORMAT_VERSION = 1


class SavedState(NamedTuple):
    """What one step's folder holds.

    Attributes:
      step: how many optimiser steps had been taken.
      adapters: `{adapter name: tree}`.
      optimizer: everything else of the training state, in the tree it was saved from.
      data: JSON values: where the data iterators stood.
      metadata: JSON values: identity of the base and other facts of the run.
    """

    step: int
    adapters: Any
    optimizer: Any
    data: dict[str, Any]
    metadata: dict[str, Any]


class CapturedState(NamedTuple):
    """The arrays of a training state at one moment, still on the device; see `capture`."""

    adapters: Snapshot
    optimizer: Snapshot


def capture(adapters: Any, optimizer: Any) -> CapturedState:
    """Copies a state on the device, without waiting for it; the next step may have the arrays.

    Args:
      adapters, optimizer: trees of jax arrays; `optimizer` is any tree whose nodes have names.
    """
    return CapturedState(take_snapshot(adapters), take_snapshot(nested(named_leaves(optimizer))))


class TrainingStore:
    """The training states of one run.

    Not safe for two runs at once: the caller holds the work directory's lock.
    """

    def __init__(self, folder: Path, *, every: int, keep: int):
        """Opens or creates `folder`; removes what an interrupted save left there.

        Args:
          folder: holds one folder per step; absolute.
          every: a save is due at each multiple of this many steps.
          keep: how many saved steps stay, the newest ones.

        Raises:
          CheckpointError: `folder` cannot be made or written.
        """
        self.folder = folder.absolute()
        register_folder(self.folder)
        with disk_errors(self.folder):
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=("adapters", "optimizer", "data", "metadata"),
                options=ocp.CheckpointManagerOptions(
                    save_decision_policy=policies.FixedIntervalPolicy(every),
                    preservation_policy=policies.LatestN(keep),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                    lightweight_initialize=True,  # an old step may be half deleted; nobody asks
                ),
            )

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether `save` should be called after this step."""
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
        """`capture` and `write` at once; arguments and errors as there."""
        self.write(step, capture(adapters, optimizer), data=data, metadata=metadata)

    def write(
        self, step: int, state: CapturedState, *, data: dict[str, Any], metadata: dict[str, Any]
    ) -> None:
        """Copies a captured state off the device and writes it in the background.

        Waits for the previous save to end first. A step that is already there is left alone.

        Args:
          step: how many optimiser steps had been taken.
          state: as it was then.
          data, metadata: plain JSON values.

        Raises:
          TrainingError: an adapter leaf is not finite; nothing is written.
          CheckpointError: the disk is full, or this or the previous save failed otherwise.
        """
        if step == self.latest:
            return
        state.adapters.require_finite(step)
        sums = {name: own.checksums() for name, own in state._asdict().items()}
        header = {"format_version": FORMAT_VERSION, "checksums": sums}
        with disk_errors(self.folder / str(step), self.kept()):
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

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
          CheckpointError: the write in the background failed, for example on a full disk.
        """
        with disk_errors(self.folder, self.kept()):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last write and releases the threads; errors as in `wait`."""
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
        else:  # let a save that is under way end, and let the error at hand be the one that is seen
            with contextlib.suppress(CheckpointError):
                self.wait()

    def restore(self, step: int, adapters: Any, optimizer: Any) -> SavedState:
        """Reads a saved step onto the devices.

        Args:
          step: which one.
          adapters, optimizer: trees of `ShapeDtypeStruct` with shardings, as they are to be; the
            mesh may differ from the one that saved.

        Raises:
          CheckpointError: damaged, of another format, or not exactly these leaves.
        """
        paths = named_leaves(optimizer)
        leaves = self._restore_item(step, "optimizer", nested(paths))
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
        """Reads only the adapters of a saved step; see `restore`."""
        return self._restore_item(step, "adapters", adapters)

    def _restore_item(self, step: int, item: str, target: Any) -> Any:
        sums = read_metadata(self.folder, step)["checksums"][item]
        folder = self.folder / str(step) / item
        return restore_tree(folder, target, sums, _advice(self.folder, step))

    def kept(self) -> str:
        """Which state is safe on the disk, in words, for messages."""
        # Read from the disk: Orbax's own list already counts the step that is being written.
        step = latest_step(self.folder)
        return "no state was saved before" if step is None else f"the state at step {step} is kept"


def latest_step(folder: Path) -> int | None:
    """The newest complete step in a `TrainingStore`'s folder, or None; touches no device."""
    return max(_steps(folder), default=None)


def read_metadata(folder: Path, step: int) -> dict[str, Any]:
    """The metadata of a saved step, without its arrays; touches no device.

    Raises:
      CheckpointError: missing, damaged, or of another format version.
    """
    metadata = _read_json(folder, step, "metadata")
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / str(step)} has format version {version!r}, this release reads "
            f"{FORMAT_VERSION}; resume with the release that wrote it"
        )
    return metadata


def _steps(folder: Path) -> list[int]:
    # Orbax gives a step's folder its number as the name by a rename, when all of it is written.
    return [int(child.name) for child in folder.glob("[0-9]*") if child.name.isdecimal()]


def _read_json(folder: Path, step: int, item: str) -> dict[str, Any]:
    file = folder / str(step) / item / "metadata"  # the name that Orbax gives JSON items
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({first_line(error)}); {_advice(folder, step)}"
        ) from None


def _advice(folder: Path, step: int) -> str:
    older = max((other for other in _steps(folder) if other < step), default=None)
    return f"delete {folder / str(step)} to resume from " + (
        "the start" if older is None else f"step {older}"
    )
