"""Keeps Orbax from printing tracebacks of failures that it also raises."""

import functools
import logging
import sys
import traceback
from typing import Any


class _NoTracebacks(logging.Filter):
    """Drops what Orbax logs about a failed save: the same exception reaches the caller."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


@functools.cache
def quiet_orbax() -> None:
    """Installs filters for the log, and for what background reads leave behind when one fails.

    When one array of a tree cannot be read, Orbax raises and closes its event loop, while reads of
    the other arrays are still under way; each of these then ends in an "Exception ignored in".
    """
    logging.getLogger("absl").addFilter(_NoTracebacks())
    former = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        frames = traceback.extract_tb(unraisable.exc_traceback)
        late_read = any("orbax" in frame.filename for frame in frames)
        if not late_read and str(unraisable.exc_value) != "Event loop is closed":
            former(unraisable)

    sys.unraisablehook = hook
