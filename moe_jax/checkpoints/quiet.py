"""Keeps Orbax from printing tracebacks of failed writes that it also raises."""

import functools
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

_folders: set[str] = set()


def _of_orbax(error: BaseException | None, trace: Any) -> bool:
    # TensorStore's own errors have no traceback until somebody waits for them, but name the folder.
    return any("orbax" in frame.filename for frame in traceback.extract_tb(trace)) or any(
        folder in str(error) for folder in _folders
    )


class _NoLateWrites(logging.Filter):
    """Drops what asyncio logs about writes that nobody waits for, since another one failed."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and _of_orbax(record.exc_info[1], record.exc_info[2]))


class _NoTracebacks(logging.Filter):
    """Drops what Orbax logs about a failed save: the same exception reaches the caller."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


def quiet_orbax(folder: Path) -> None:
    """Drops what Orbax and asyncio print about failed writes in `folder`.

    When one array of a tree cannot be written, Orbax raises that and closes its event loop, while
    other writes are under way. What is printed of these depends on when they end: "Exception
    ignored in" a coroutine of Orbax or, "Event loop is closed", in a callback of TensorStore; or
    "exception was never retrieved" of a task with a traceback, or of a future with none. All of
    them are dropped for the rest of the process, and others' reports stay.
    """
    _folders.add(str(folder.absolute()))
    _install()


@functools.cache
def _install() -> None:
    logging.getLogger("absl").addFilter(_NoTracebacks())
    logging.getLogger("asyncio").addFilter(_NoLateWrites())
    former = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        callback = str(error) == "Event loop is closed" and unraisable.object is None
        if not callback and not _of_orbax(error, unraisable.exc_traceback):
            former(unraisable)

    sys.unraisablehook = hook
