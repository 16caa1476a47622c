"""Failures of the disk as one-line errors.

A full disk shows up in many shapes: as `OSError` from Python's own writes, as `ValueError` with
TensorStore's status text, raised at once or later from the thread that writes in the background.
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
      folder: what was being written.
      kept: what is still good, appended to the message.

    Raises:
      CheckpointError: the disk is full, read-only, gone, or not ours to write.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        advice = "free some space and" if reason in _FULL.values() else "mend that and"
        suffix = f" ({kept})" if kept else ""
        raise CheckpointError(
            f"cannot write {folder}: {reason}; {advice} run the same command again{suffix}"
        ) from error


def behind_link(folder: Path) -> Path:
    """The absolute path of a folder that may be a symbolic link: what the link leads to, if so.

    A folder cannot be renamed onto a link, and one on another disk is to be written there.
    """
    folder = folder.absolute()
    # Unlike `Path.resolve`, this raises nothing where links lead in a circle.
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuses to begin what the disk has no space for.

    Args:
      folder: will be written to; need not exist yet.
      num_bytes: that it will take, at most.

    Raises:
      CheckpointError: the disk has less than that.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    with disk_errors(folder):
        free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(
            f"cannot write {folder}: it takes {num_bytes / 1e6:,.1f} MB and the disk has "
            f"{free / 1e6:,.1f} MB; free some space or give a folder on another disk"
        )


def _reason(error: BaseException) -> str | None:
    """What the disk said, or None if this is not about the disk."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        number = link.errno if isinstance(link, OSError) else None
        status = re.search(
            r"os_error_code='(\d+)'", str(link)
        )  # TensorStore's way of quoting errno
        if number is None and status:
            number = int(status.group(1))
        if number is not None:
            return _FULL.get(number) or os.strerror(number).lower()
    return None
