"""Errors of memory say what helps; others are left as they are."""

import jax
import pytest

from moe_jax.errors import DeviceError
from moe_jax.sharding.memory import memory_errors


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nAt"),
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
        ),
        (MemoryError(), "out of memory"),
    ],
)
def test_memory_that_does_not_do(error, reason):
    with pytest.raises(DeviceError) as raised, memory_errors("give less"):
        raise error
    assert str(raised.value) == f"memory does not do ({reason}): give less"
    assert raised.value.__cause__ is error


def test_other_errors_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_errors("give less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
