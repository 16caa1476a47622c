"""The rate of matrix products: given, of the data sheet, or measured."""

import types

import pytest

from moe_jax.compiled import matrix_rate
from moe_jax.compiled.matrix_rate import MatrixProduct

H200 = [types.SimpleNamespace(device_kind="NVIDIA H200", process_index=0)] * 8


@pytest.mark.parametrize(
    ("dtype", "given", "flops", "source"),
    [
        ("bfloat16", None, 8 * 989e12, "peak of NVIDIA H200 in bfloat16"),
        ("float32", None, 8 * 494e12, "peak of NVIDIA H200 in float32"),
        ("bfloat16", 790.0, 8 * 790e12, "as given by logging.matrix_tflops"),
    ],
)
def test_the_rate_of_known_chips(dtype, given, flops, source):
    assert matrix_rate.matrix_rate(H200, dtype, given) == (flops, source)


def test_the_rate_of_other_devices_is_measured_once(devices, monkeypatch):
    monkeypatch.setattr(matrix_rate, "_LEAST_SECONDS", 0.0)
    measured = []

    def seconds(product):
        measured.append(product.flops)
        return [0.5, 0.25, 1.0][len(measured) - 1]

    compiled = MatrixProduct("float32", devices[:2], 64)
    # Two multiply-adds of 64 x 64 x 64 for each of two devices.
    assert compiled.flops == 2 * 2 * 64**3
    monkeypatch.setattr(matrix_rate, "MatrixProduct", lambda *_: compiled)
    monkeypatch.setattr(MatrixProduct, "seconds", seconds)
    matrix_rate._measured_rate.cache_clear()
    for _ in range(2):
        rate = matrix_rate.matrix_rate(devices[:2], "float32")
        assert rate == (2 * 2 * 64**3 / 0.25, "measured product of float32")
    assert len(measured) == 3
    matrix_rate._measured_rate.cache_clear()
