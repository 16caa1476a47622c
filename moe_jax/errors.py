"""Errors whose cause lies with the user's input.

Every command catches `UserError`, prints its one-line message and exits with status 2, without a
traceback. A message names the file, field or key at fault and says what to do about it. Anything
that is not a `UserError` is a defect of this library and keeps its traceback.
"""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something the user gave cannot be used as it is."""


class ConfigError(UserError):
    """A field of the run's configuration is unknown, of the wrong type or out of range."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged or belongs to something else."""


class DataError(UserError):
    """A data set cannot be read, or one of its rows does not fit the declared schema."""


class DeviceError(UserError):
    """The devices at hand do not fit the mesh that the configuration asks for."""


class TrainingError(UserError):
    """Training cannot go on, for example because every recent gradient was not finite."""


def report(error: UserError) -> int:
    """Prints what the user got wrong as one line on stderr; returns the exit status."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Puts the field of the configuration that an error is about in front of its message."""
    try:
        yield
    except UserError as error:
        error.args = (f"{field}: {error}",)
        raise
