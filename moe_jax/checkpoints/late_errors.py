"""Late errors of failed writes, which Orbax and asyncio print although the first error was raised.

When one array of a tree cannot be written, Orbax raises that error and closes its event loop while
other writes are under way. Depending on when these end, Python prints "Exception ignored in" for a
coroutine of Orbax, "Event loop is closed" for a callback of TensorStore, or "exception was never
retrieved" for a task with a traceback or a future without one.
"""

import functools
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

# Here, as its logger must be made by itself: it finds the files of its callers.
import absl.logging

_written_folders: set[str] = set()


def register_folder(folder: Path) -> None:
    """Registers a folder whose late write errors `silence_late_errors` recognizes by its path."""
    _written_folders.add(str(folder.absolute()))


@functools.cache
def silence_late_errors() -> None:
    """Drops late errors of failed writes for the rest of the process; other reports stay.

    For programs only: it installs logging filters and replaces `sys.unraisablehook`.
    """
    absl.logging.get_absl_logger().addFilter(_raised_anyway_filter)
    logging.getLogger("asyncio").addFilter(_late_error_filter)
    former_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        callback = str(error) == "Event loop is closed" and unraisable.object is None
        if not callback and not _is_late_error(error, unraisable.exc_traceback):
            former_hook(unraisable)

    sys.unraisablehook = hook


def _raised_anyway_filter(record: logging.LogRecord) -> bool:
    """Drops Orbax's log of a failed save: the same exception reaches the caller."""
    return not (record.exc_info and "orbax" in record.pathname)


def _late_error_filter(record: logging.LogRecord) -> bool:
    """Drops asyncio's log of writes that are not awaited because another write failed."""
    return not (record.exc_info and _is_late_error(record.exc_info[1], record.exc_info[2]))


def _is_late_error(error: BaseException | None, trace: Any) -> bool:
    # TensorStore's errors have no traceback until they are awaited, but name the folder.
    return any("orbax" in frame.filename for frame in traceback.extract_tb(trace)) or any(
        folder in str(error) for folder in _written_folders
    )
