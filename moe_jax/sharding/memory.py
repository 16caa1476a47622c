"""Words for what does not fit into memory."""

import contextlib
from collections.abc import Iterator

import jax

from moe_jax.errors import DeviceError

_SIGNS = ("resource_exhausted", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of a device, did not do."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in _SIGNS)


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Says what helps where memory runs out.

    Args:
      advice: what to give in place of what, as an order.

    Raises:
      DeviceError: in place of an error of jax or of Python for which memory did not do.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "out of memory"
        raise DeviceError(f"memory does not do ({reason}): {advice}") from error
