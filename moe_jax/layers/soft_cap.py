"""Keeps scores within bounds, smoothly."""

import jax
import jax.numpy as jnp


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """`cap tanh(x / cap)`: near x where x is small, never beyond `cap` (arXiv:2408.00118, sec. 2).

    Args:
      x: any shape, float32.
      cap: positive.
    """
    return cap * jnp.tanh(x / cap)
