"""Running out of memory is reported in one line with advice; other errors are unchanged."""

import jax
import pytest

from moe_jax.errors import DeviceError, memory_errors


@pytest.mark.parametrize(
    ("error", "details"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nAt"),
            " (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)",
        ),
        (MemoryError(), ""),
    ],
)
def test_out_of_memory(error, details):
    with pytest.raises(DeviceError) as raised, memory_errors("a smaller batch"):
        raise error
    assert str(raised.value) == f"out of memory{details}: try a smaller batch"
    assert raised.value.__cause__ is error


def test_other_errors_are_unchanged():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_errors("a smaller"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
