"""The main function of a test's process, which prints to a file and exits as a command does."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from moe_jax.errors import UserError, report


def run_member(log: Path, function: Callable[[], int]) -> None:
    """Exits with the status that `function` returns, or with that of its error."""
    sys.stdout = sys.stderr = stream = log.open("a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    try:
        status = function()
    except UserError as error:
        status = report(error)
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        status = error.code
    except (MemoryError, RuntimeError):  # others are printed by `multiprocessing`
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # which processes of `multiprocessing` leave out
    sys.exit(status)
