"""Dropout whose random bits cost a few operations an element.

JAX's default generator takes about fifty integer operations for each 32-bit word, more than the
low-rank product behind the dropout. Here the generator makes one word for each token and one for
each feature, and an element's bits are a hash of the sum of both. XLA fuses the hash into the
product that reads the result, so that no mask is stored.
"""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float | jax.Array, key: jax.Array) -> jax.Array:
    """Sets elements of `x` to zero with probability `rate`, and divides the others by `1 - rate`.

    The result is the same on every mesh.

    Args:
      x: [..., F].
      rate: in [0, 1); may be traced.
      key: random key.
    """
    tokens, features, limit = dropout_words(x.shape, rate, key)
    kept = mixed(tokens + features) >= limit
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros_like(x))


def dropout_words(
    shape: tuple[int, ...], rate: float | jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Words of tokens [..., 1] and features [1, ..., F], and a limit; uint32.

    `dropout` keeps the elements of `shape` [..., F] whose `mixed` sum of both words is not below
    the limit.
    """
    token_key, feature_key = jax.random.split(key)
    tokens = jax.random.bits(token_key, (*shape[:-1], 1), jnp.uint32)
    features = jax.random.bits(feature_key, (1,) * (len(shape) - 1) + shape[-1:], jnp.uint32)
    return tokens, features, (jnp.float32(rate) * 2.0**32).astype(jnp.uint32)


def mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit changes half of the output bits.

    `lowbias32` of C. Wellons, "Prospecting for Hash Functions", 2018.
    """
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))
