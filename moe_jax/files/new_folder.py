"""A folder that appears complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import CheckpointError
from moe_jax.files.disk import behind_link, disk_errors, require_space


def require_unused(folder: Path) -> None:
    """Refuses a folder that holds something already.

    Raises:
      CheckpointError: `folder` is a file, a folder that is not empty, or a mount point, whose place
        no other folder can take.
    """
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder}: is a file; give a folder that does not exist yet")
        if folder.is_dir() and any(folder.iterdir()):
            raise CheckpointError(
                f"{folder}: is not empty, and nothing in it is overwritten; give another folder"
            )
        if os.path.ismount(folder):
            raise CheckpointError(f"{folder}: is a mount point; give a new folder in it")


@contextlib.contextmanager
def new_folder(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yields a folder to write to, which becomes `folder` if all goes well and is removed if not.

    It lies beside `folder`, or beside what a symbolic link of that name leads to, so that renaming
    moves no data. What a former process left there when it was killed is removed first.

    Args:
      folder: does not exist yet, or is empty.
      num_bytes: that will be written, at most; looked for before anything is.

    Raises:
      CheckpointError: `folder` is not empty, or the disk is too small, full or not writable.
    """
    folder = behind_link(folder)
    require_unused(folder)
    require_space(folder, num_bytes)
    incomplete = folder.with_name(f".{folder.name}.incomplete")
    try:
        with disk_errors(folder):
            shutil.rmtree(incomplete, ignore_errors=True)
            incomplete.mkdir(parents=True)
            yield incomplete
            incomplete.rename(folder)
    except BaseException:
        shutil.rmtree(incomplete, ignore_errors=True)
        raise
