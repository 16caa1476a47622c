"""Kernels in eight and four bits: stored arrays, decoded values and products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FLOAT32_PRODUCT, ROUNDING, SIX_DIGITS

from moe_jax.layers import quantized
from moe_jax.layers.frozen import frozen_product
from moe_jax.layers.quantized import BLOCK, NF4_LEVELS, dense_kernel

KINDS = ("int8", "fp8", "nf4", "nf4_double")
quantize = jax.jit(quantized.quantize, static_argnums=1)
SHAPE = (3 * BLOCK + 22, 10)  # the last block is a short one


def _kernel(seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    # Outputs of very different sizes, as outliers make them.
    return (rng.standard_normal(shape) * np.exp(rng.normal(0, 1, shape[1]))).astype(np.float32)


def _nearest(values, levels):
    """Nearest code, by exhaustive search."""
    levels = np.asarray(levels, np.float64)
    return levels[np.argmin(np.abs(values[..., None] - levels), axis=-1)]


def test_int8_by_output():
    kernel = _kernel()
    expected = np.empty(SHAPE)
    for column in range(SHAPE[1]):
        scale = np.abs(kernel[:, column]).max() / 127
        expected[:, column] = np.round(kernel[:, column] / scale) * scale
    stored = quantize(jnp.asarray(kernel), "int8")
    assert stored.codes.dtype == jnp.int8
    assert stored.shape == SHAPE
    # A value just between two codes may go to either.
    half = np.abs(kernel).max(axis=0) / 127 / 2
    assert (np.abs(np.asarray(dense_kernel(stored)) - kernel) <= half * 1.0001).all()
    np.testing.assert_allclose(dense_kernel(stored), expected, **ROUNDING)


def test_fp8_by_output():
    kernel = _kernel()
    stored = quantize(jnp.asarray(kernel), "fp8")
    assert stored.codes.dtype == jnp.float8_e4m3fn
    # Three bits of mantissa: 1/16 of the value, and the least step of small ones.
    error = np.abs(np.asarray(dense_kernel(stored)) - kernel)
    least = np.abs(kernel).max(axis=0) / 448 * 2.0**-10
    assert (error <= np.abs(kernel) / 16 * 1.0001 + least).all()
    assert error.max() > 0


def test_nf4_by_block():
    kernel = _kernel().astype(np.float64)
    expected = np.empty(SHAPE)
    for column in range(SHAPE[1]):
        for start in range(0, SHAPE[0], BLOCK):
            block = kernel[start : start + BLOCK, column]
            scale = float(jnp.bfloat16(np.abs(block).max()))
            expected[start : start + BLOCK, column] = _nearest(block / scale, NF4_LEVELS) * scale
    stored = quantize(jnp.asarray(kernel), "nf4")
    assert stored.codes.shape == (SHAPE[0] // 2, SHAPE[1])
    assert stored.shape == SHAPE
    np.testing.assert_allclose(dense_kernel(stored), expected, **ROUNDING)


def test_nf4_levels_are_equal_parts_of_a_normal_distribution():
    # arXiv:2305.14314, eq. 4: midpoints of 2^4 + 1 quantiles, on either side of an exact zero.
    from statistics import NormalDist

    offset = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(q) for q in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(q) for q in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*positive, 0.0, *negative]) / max(positive)
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=SIX_DIGITS)


def test_double_scales_lie_within_half_a_step():
    kernel = jnp.asarray(_kernel(shape=(40 * BLOCK, 6)))
    scales = np.abs(np.asarray(kernel).reshape(40, BLOCK, 6)).max(axis=1)
    double = quantize(kernel, "nf4_double").scales
    half = (scales.max(axis=0) - scales.min(axis=0)) / 255 / 2
    error = np.abs(np.asarray(double.dense()) - scales)
    assert (error <= half * 1.001).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_equal_values(kind):
    kernel = np.zeros((BLOCK, 3), np.float32)
    kernel[:, 1] = -2.5
    np.testing.assert_allclose(
        dense_kernel(quantize(jnp.asarray(kernel), kind)), kernel, **ROUNDING
    )


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_dense_kernel(kind):
    kernel = quantize(jnp.asarray(_kernel()), kind)
    dense = np.asarray(dense_kernel(kernel), np.float64)
    rng = np.random.default_rng(1)
    x, seen = rng.standard_normal((2, 5, SHAPE[0])), rng.standard_normal((2, 5, SHAPE[1]))

    def value(x):
        return jnp.sum(frozen_product(x, kernel) * seen)

    y = frozen_product(jnp.asarray(x, jnp.float32), kernel)
    np.testing.assert_allclose(y, x @ dense, **FLOAT32_PRODUCT)
    gradient = jax.grad(value)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(gradient, seen @ dense.T, **FLOAT32_PRODUCT)


def test_errors_fall_with_the_bits():
    kernel = _kernel(shape=(512, 64))
    errors = [
        float(np.linalg.norm(dense_kernel(quantize(jnp.asarray(kernel), kind)) - kernel))
        for kind in ("int8", "fp8", "nf4")
    ]
    share = np.asarray(errors) / np.linalg.norm(kernel)
    assert errors == sorted(errors)
    # Of normal values: a step of an eighth of a per cent of +-3.2 sd, 3 mantissa bits, 16 levels.
    assert share[0] < 0.012
    assert share[1] < 0.035
    assert 0.05 < share[2] < 0.11


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="int3"):
        quantized.quantize(jnp.ones((64, 2)), "int3")
