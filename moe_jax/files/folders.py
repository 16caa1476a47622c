"""Folders that appear complete or not at all, and folders that are replaced by another."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import CheckpointError
from moe_jax.files.disk import disk_errors, require_space, resolve_link


def require_unused(folder: Path) -> None:
    """Requires that `folder` does not exist or is empty.

    Raises:
      CheckpointError: `folder` is a file, a folder that is not empty, or a mount point, onto which
        no other folder can be renamed.
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
    """Yields a temporary folder that is renamed to `folder` on success and removed on failure.

    It lies beside `folder`, or beside the target of a symbolic link of that name, so that renaming
    moves no data. Leftovers of a killed process are removed first.

    Args:
      folder: must not exist yet, or be empty.
      num_bytes: upper bound of the bytes to write, checked against the free space first.

    Raises:
      CheckpointError: `folder` is not empty, or the disk is too small, full or not writable.
    """
    folder = resolve_link(folder)
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


# Python cannot exchange two folders in a single step, so there is a moment at which neither is in
# its place. Until the new folder is, the former one lies beside it under another name, complete.
# Readers find it there after a process was killed.


def replace_folder(folder: Path, complete: Path) -> None:
    """Renames the folder `complete`, which lies beside `folder`, to `folder`.

    Raises:
      OSError: the file system refuses a rename.
    """
    folder = resolve_link(folder)
    former = restore_former_folder(folder)
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    try:
        complete.rename(folder)
    except BaseException:
        restore_former_folder(folder)
        raise
    if former.exists():
        # Removed under a name that is never read: half of a folder must not be taken for all of it.
        former.rename(complete)
        shutil.rmtree(complete, ignore_errors=True)


def restore_former_folder(folder: Path) -> Path:
    """Undoes a `replace_folder` that was killed. Only a process that writes `folder` may call this.

    Returns:
      Path to which `replace_folder` moves the former folder.

    Raises:
      OSError: the file system refuses a rename.
    """
    folder = resolve_link(folder)
    former = _former(folder)
    stale = former.with_suffix(".stale")
    if stale.exists():  # left by a process that was killed in the removal below
        shutil.rmtree(stale, ignore_errors=True)
    if former.is_dir():
        if folder.exists():
            # Killed after the new folder was in place. The former one must not come back should
            # the new one be deleted.
            former.rename(stale)
            shutil.rmtree(stale, ignore_errors=True)
        else:
            former.rename(folder)
    return former


def current_folder(folder: Path) -> Path:
    """Path at which the content of `folder` is found. Changes nothing, so any reader may call it.

    It is `folder` itself, unless `replace_folder` was killed between its two renames.
    """
    # `os.path`, since pathlib raises PermissionError here; the reader reports that.
    if os.path.exists(folder):
        return folder
    former = _former(folder)
    return former if os.path.isdir(former) else folder


def _former(folder: Path) -> Path:
    folder = resolve_link(folder)
    return folder.with_name(f".{folder.name}.former")
