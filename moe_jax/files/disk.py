"""Disk errors as one-line messages, and the space that a write needs.

A full disk shows up as `OSError` from Python's own writes, or as `ValueError` with TensorStore's
status text, raised at once or later by the thread that writes in the background.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import CheckpointError

_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the disk quota is used up"}


@contextlib.contextmanager
def disk_errors(folder: Path, kept: str = "") -> Iterator[None]:
    """Turns a failure to write below `folder` into a `CheckpointError` that names it.

    Args:
      folder: file or folder that is written, named in the message.
      kept: what is still valid, appended to the message.

    Raises:
      CheckpointError: the disk is full, read-only, missing or not writable.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        advice = "free some space and" if reason in _FULL.values() else "fix that and"
        suffix = f" ({kept})" if kept else ""
        raise CheckpointError(
            f"cannot write {folder}: {reason}; {advice} run the same command again{suffix}"
        ) from error


def resolve_link(folder: Path) -> Path:
    """Absolute path of `folder`, or of its target if it is a symbolic link.

    A folder cannot be renamed onto a link, and a target on another disk must be written there.
    """
    folder = folder.absolute()
    # Unlike `Path.resolve`, this raises nothing for a circle of links.
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def require_space(folder: Path, num_bytes: int) -> None:
    """Requires `num_bytes` of free disk space.

    Args:
      folder: folder to be written; need not exist yet.
      num_bytes: upper bound of its size.

    Raises:
      CheckpointError: the disk has less free space.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    with disk_errors(folder):
        free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(
            f"cannot write {folder}: it takes {_size(num_bytes)} and the disk has {_size(free)}; "
            "free some space or give a folder on another disk"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"


def _reason(error: BaseException) -> str | None:
    """Reason that the operating system gives, or None for an error that is not the disk's."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        number = link.errno if isinstance(link, OSError) else None
        status = re.search(r"os_error_code='(\d+)'", str(link))  # TensorStore quotes errno so
        if number is None and status:
            number = int(status.group(1))
        if number is not None:
            return _FULL.get(number) or os.strerror(number).lower()
    return None
