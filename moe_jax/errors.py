"""Errors whose cause lies with the user's input.

Every command catches `UserError`, prints its one-line message and exits with status 2, without a
traceback. A message names the file, field or key at fault and the remedy. Any other exception is a
defect of this library and keeps its traceback.
"""

import contextlib
import sys
from collections.abc import Iterator

from moe_jax.terminal import print_shown, shortened


class UserError(Exception):
    """An input of the user is invalid. The middle of a very long message is left out."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class ConfigError(UserError):
    """A configuration field is unknown, of the wrong type or out of range."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged or does not match."""


class DataError(UserError):
    """A data set cannot be read, or one of its rows does not fit the declared schema."""


class DeviceError(UserError):
    """The available devices do not fit the mesh, or ran out of memory."""


class TrainingError(UserError):
    """Training cannot continue, for example because all recent gradients were not finite."""


def report(error: UserError) -> int:
    """Prints the error as one line on stderr; returns the exit status."""
    print_shown(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def error_prefix(field: str) -> Iterator[None]:
    """Prefixes the message of a `UserError` with the configuration field that it is about."""
    try:
        yield
    except UserError as error:
        error.args = (f"{field}: {error}",)
        raise


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turns running out of memory, of the host or of a device, into a `DeviceError`.

    Args:
      advice: settings to try, as a noun phrase.

    Raises:
      DeviceError: in place of a `MemoryError` or of jax's out-of-memory error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        details = f" ({reason})" if reason else ""
        raise DeviceError(f"out of memory{details}: try {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` reports that the host or a device ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    import jax  # here, so that commands can answer --help without it

    text = str(error).lower()
    signs = ("resource_exhausted", "out of memory")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in signs)
