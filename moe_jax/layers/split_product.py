"""Product of bfloat16 tokens with a float32 matrix, as precise as in float32.

A float32 number is the sum of three bfloat16 numbers, to its last bit. The tokens are multiplied
with the three parts of the matrix, and the sums are float32. The tokens are read as they are:
their float32 copy, [T, D], takes longer to write and read than the product of a narrow matrix.
"""

import jax
import jax.numpy as jnp

_PARTS = 3


def split_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` in float32.

    Args:
      x: [T, D]; tokens of another dtype than bfloat16 are multiplied in float32.
      matrix: float32 [D, E], narrow.

    Returns:
      float32 [T, E].
    """
    if x.dtype != jnp.bfloat16:
        return jnp.dot(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)
    return _product(x, matrix)


@jax.custom_vjp
def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return _sum_of_parts(jnp.dot(x, _parts(matrix), preferred_element_type=jnp.float32))


def _forward(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, matrix), (x, matrix)


def _backward(
    residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, matrix = residuals
    parts, matrix_parts = _parts(cotangent), _parts(matrix)
    d_matrix = jnp.dot(x.T, parts, preferred_element_type=jnp.float32)
    # The gradient of x is rounded to bfloat16: the parts' products of the first two orders suffice.
    high, low, _ = jnp.split(parts, _PARTS, axis=-1)
    matrix_high, matrix_low, _ = jnp.split(matrix_parts, _PARTS, axis=-1)
    left = jnp.concatenate([high, high, low], axis=-1)
    right = jnp.concatenate([matrix_high, matrix_low, matrix_high], axis=-1)
    return jnp.dot(left, right.T), _sum_of_parts(d_matrix)


_product.defvjp(_forward, _backward)


def _parts(array: jax.Array) -> jax.Array:
    """The bfloat16 parts of a float32 array [..., E], largest first, [..., 3 E]."""
    parts = []
    for _ in range(_PARTS):
        # Unlike a conversion and back, XLA does not remove it.
        part = jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        array = array - part
    return jnp.concatenate(parts, axis=-1)


def _sum_of_parts(array: jax.Array) -> jax.Array:
    """The sum [..., E] of the products with the parts, [..., 3 E], smallest first."""
    high, middle, low = jnp.split(array, _PARTS, axis=-1)
    return (low + middle) + high
