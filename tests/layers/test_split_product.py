"""The product of bfloat16 tokens with a float32 matrix, against NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.split_product import split_product

TOKENS, WIDTH, EXPERTS = 40, 256, 8


def _inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (TOKENS, WIDTH)).astype(jnp.bfloat16)
    sizes = np.logspace(-4, 3, EXPERTS, dtype=np.float32)[None]
    matrix = jax.random.normal(keys[1], (WIDTH, EXPERTS)) * sizes
    return x, matrix, jax.random.normal(keys[2], (TOKENS, EXPERTS))


def _double(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def _assert_close(found, exact, sizes, digits):
    """Compares sums of products with the exact ones, relative to the sum of their sizes."""
    assert np.max(np.abs(_double(found) - exact) / sizes) < 2.0**-digits


def test_it_is_as_precise_as_float32():
    x, matrix, cotangent = _inputs()
    product, backward = jax.vjp(jax.jit(split_product), x, matrix)
    d_x, d_matrix = backward(cotangent)
    assert (product.dtype, d_x.dtype, d_matrix.dtype) == ("float32", "bfloat16", "float32")
    x, matrix, cotangent = map(_double, (x, matrix, cotangent))
    _assert_close(product, x @ matrix, np.abs(x) @ np.abs(matrix), 21)
    _assert_close(d_matrix, x.T @ cotangent, np.abs(x).T @ np.abs(cotangent), 21)
    _assert_close(d_x, cotangent @ matrix.T, np.abs(cotangent) @ np.abs(matrix).T, 8)


def test_tokens_are_not_copied_to_float32():
    x, matrix, cotangent = _inputs()

    def gradients(x, matrix, cotangent):
        return jax.vjp(split_product, x, matrix)[1](cotangent)

    program = jax.jit(gradients).lower(x, matrix, cotangent).as_text()
    assert not re.search(rf"tensor<({TOKENS}x{WIDTH}|{WIDTH}x{TOKENS})xf32>", program)


def test_other_tokens_are_multiplied_in_float32():
    x, matrix, _ = _inputs()
    wide = x.astype(jnp.float32) * 1.0009765625  # not a bfloat16 number
    product = split_product(wide, matrix)
    sizes = np.abs(_double(wide)) @ np.abs(_double(matrix))
    _assert_close(product, _double(wide) @ _double(matrix), sizes, 21)
