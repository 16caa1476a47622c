"""The product of every token with a trained matrix."""

from typing import Any

import jax
import jax.numpy as jnp


def token_product(x: jax.Array, matrix: jax.Array, **options: Any) -> jax.Array:
    """`x @ matrix`, [..., in] and [in, out] to [..., out], with all tokens along one axis.

    The gradient of `matrix` is a product over all tokens. Over the two axes [B, S] XLA would make
    it out of a transposed copy of the wider operand (of [B, S, F] where `out` is F); over one axis
    it transposes nothing.

    Args:
      x: the tokens.
      matrix: cast to the type of `x` by the caller, where they differ.
      options: of `jnp.dot`.
    """
    flat = jnp.dot(x.reshape(-1, x.shape[-1]), matrix, **options)
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])
