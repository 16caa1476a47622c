"""A disk that fills up while a state is written loses the new state only."""

import errno
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints.store import TrainingStore, latest_step
from moe_jax.errors import CheckpointError
from moe_jax.files.disk import disk_errors

# Text of TensorStore 0.1, as a write in the background raised it on a full disk.
TENSORSTORE_TEXT = (
    'RESOURCE_EXHAUSTED: Error writing "a.w/0" in OCDBT database at local file "/runs/5/": Failed '
    'writing: "/runs/5/d/5f9c": Failed to write 45812 bytes to file 33: No space left on device '
    "[os_error_code='28']"
)
KIBIBYTE = 1024


class SmallDisk:
    """A small file system if the machine allows mounting one, else a TensorStore error."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        folder.mkdir()
        self.folder = folder
        self._monkeypatch = monkeypatch
        mount = ["mount", "-t", "tmpfs", "-o", f"size={1000 * KIBIBYTE}", "tmpfs", str(folder)]
        self.real = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def save_until_full(self, store: TrainingStore, state: dict) -> None:
        for step in range(1, 20):
            if step == 3 and not self.real:
                store.wait()
                self._monkeypatch.setattr(store._manager, "wait_until_finished", self._fail)
            save(store, step, state)
        store.wait()

    def grow(self) -> None:
        self._monkeypatch.undo()
        if self.real:
            resize = ["mount", "-o", f"remount,size={20_000 * KIBIBYTE}", str(self.folder)]
            subprocess.run(resize, check=True)

    def remove(self) -> None:
        if self.real:
            subprocess.run(["umount", str(self.folder)], check=True)

    def _fail(self) -> None:
        raise ValueError(TENSORSTORE_TEXT)


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    disk = SmallDisk(tmp_path / "disk", monkeypatch)
    yield disk
    disk.remove()


def save(store, step, adapters):
    store.save(step, adapters=adapters, optimizer={"n": jnp.int32(0)}, data={}, metadata={})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # late errors
def test_a_full_disk_keeps_the_former_state(small_disk):
    folder = small_disk.folder / "states"
    state = {"a": {"w": jax.random.normal(jax.random.key(0), (50_000,))}}  # hardly compresses
    with pytest.raises(CheckpointError) as error, TrainingStore(folder, every=1, keep=20) as store:
        small_disk.save_until_full(store, state)
    message, good = str(error.value), latest_step(folder)
    assert good is not None
    assert str(folder) in message
    assert "no space left on the disk; free some space and run the same command again" in message
    assert f"the state at step {good} is kept" in message
    assert "\n" not in message

    small_disk.grow()
    with TrainingStore(folder, every=1, keep=20) as store:
        assert store.latest == good
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        restored = store.restore_adapters(good, target)
        np.testing.assert_array_equal(restored["a"]["w"], state["a"]["w"])
        save(store, good + 1, state)
    assert latest_step(folder) == good + 1
    assert not list(folder.glob("*tmp*")), "what the failed save left is removed"


def chained(cause: Exception) -> Exception:
    error = ValueError("save failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only file system; fix that"),
        (PermissionError(errno.EACCES, "Permission denied"), "permission denied; fix that"),
        (ValueError(TENSORSTORE_TEXT), "no space left on the disk"),
        (chained(OSError(errno.ENOSPC, "full")), "no space left on the disk"),
        (chained(chained(ValueError(TENSORSTORE_TEXT))), "no space left on the disk"),
    ],
)
def test_disk_errors(error, words):
    with pytest.raises(CheckpointError) as caught, disk_errors(Path("/runs/a"), "step 3 is kept"):
        raise error
    assert str(caught.value).startswith("cannot write /runs/a: ")
    assert words in str(caught.value)
    assert str(caught.value).endswith("(step 3 is kept)")


def test_other_errors_are_unchanged():
    with pytest.raises(ValueError, match="a defect"), disk_errors(Path("/runs/a")):
        raise ValueError("a defect")
