"""A folder that is replaced by another, and found again if that was cut short.

Python has no call that exchanges two folders in a single step, so there is a moment at which
neither is in its place. Until the new one is, the former one lies beside it under a name of its
own, complete: that is where it is found by whoever comes after a process was killed.
"""

import os
import shutil
from pathlib import Path

from moe_jax.files.disk import behind_link


def replace_folder(folder: Path, complete: Path) -> None:
    """Puts the folder `complete`, which lies beside `folder`, in its place.

    Raises:
      OSError: the disk's own.
    """
    folder = behind_link(folder)
    former = put_back(folder)
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    try:
        complete.rename(folder)
    except BaseException:
        put_back(folder)
        raise
    if former.exists():
        # Under the name of what nobody reads, since half of it must not be taken for all.
        former.rename(complete)
        shutil.rmtree(complete, ignore_errors=True)


def put_back(folder: Path) -> Path:
    """Renames what `replace_folder` had put aside when it was killed; for those who write.

    Returns:
      The place where it puts things aside.

    Raises:
      OSError: the disk's own.
    """
    folder = behind_link(folder)
    former = _former(folder)
    stale = former.with_suffix(".stale")
    if stale.exists():  # half of it, left by who was killed below
        shutil.rmtree(stale, ignore_errors=True)
    if former.is_dir():
        if folder.exists():
            # Killed once the new one was in its place. Should that go, this is not to come back.
            former.rename(stale)
            shutil.rmtree(stale, ignore_errors=True)
        else:
            former.rename(folder)
    return former


def present_folder(folder: Path) -> Path:
    """Where what `folder` holds is found; changes nothing, as somebody may be writing there.

    That is `folder` itself, except where `replace_folder` was killed while neither the former nor
    the new one was in its place.
    """
    # `os.path`, since pathlib raises what it may not look at; whoever reads has words for that.
    if os.path.exists(folder):
        return folder
    former = _former(folder)
    return former if os.path.isdir(former) else folder


def _former(folder: Path) -> Path:
    folder = behind_link(folder)
    return folder.with_name(f".{folder.name}.former")
