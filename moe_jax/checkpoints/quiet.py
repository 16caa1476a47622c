"""Keeps Orbax from printing tracebacks of failures that it also raises."""

import functools
import logging
import sys
import traceback
import types
from typing import Any


def _in_orbax(trace: types.TracebackType | None) -> bool:
    return any("orbax" in frame.filename for frame in traceback.extract_tb(trace))


class _NoLateReads(logging.Filter):
    """Drops what asyncio logs about reads that nobody waits for, since another one failed."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and _in_orbax(record.exc_info[2]))


class _NoTracebacks(logging.Filter):
    """Drops what Orbax logs about a failed save: the same exception reaches the caller."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


@functools.cache
def quiet_orbax() -> None:
    """Installs filters for the log, and for what background reads leave behind when one fails.

    When one array of a tree cannot be read, Orbax raises and closes its event loop, while reads of
    the other arrays are still under way; each of these then ends in an "Exception ignored in", or
    in "Task exception was never retrieved" if it had failed by then.
    """
    logging.getLogger("absl").addFilter(_NoTracebacks())
    logging.getLogger("asyncio").addFilter(_NoLateReads())
    former = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        late_read = _in_orbax(unraisable.exc_traceback)
        if not late_read and str(unraisable.exc_value) != "Event loop is closed":
            former(unraisable)

    sys.unraisablehook = hook
