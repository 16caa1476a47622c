"""Tokens, a few at a time."""

from typing import Any

import jax
import jax.numpy as jnp

CACHED_BYTES = 2**20
"""What an array of one block may take on a CPU: a core's second cache holds about as much."""

FEWEST_TOKENS = 64
"""Of a block; a matrix product of fewer rows waits for its matrix."""


def block_length(count: int, width: int, dtype: jnp.dtype, tokens: int | None = None) -> int:
    """How many of `count` tokens on a device to compute at a time.

    On a CPU, elementwise work on an array that its cache does not hold waits for memory, several
    times as long as it computes. Elsewhere a block is all there is, unless `tokens` says less.

    Args:
      count: of the tokens.
      width: the widest array's.
      dtype: its type.
      tokens: of a block; None leaves it to the platform.

    Returns:
      A divisor of `count`: `count` itself where its divisors do not come near what is wanted.
    """
    if tokens is None:
        if jax.default_backend() != "cpu":
            return count
        tokens = max(FEWEST_TOKENS, CACHED_BYTES // (width * jnp.dtype(dtype).itemsize))
    divisors = [n for n in range(1, min(tokens, count) + 1) if count % n == 0]
    longest = divisors[-1]
    return longest if 2 * longest > tokens or longest == count else count


def take_block(tree: Any, number: jax.Array, length: int, axis: int) -> Any:
    """Block `number`, of `length` along `axis`, of each array."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, number * length, length, axis), tree
    )


def put_block(tree: Any, blocks: Any, number: jax.Array, length: int, axis: int) -> Any:
    """Arrays with their block `number`, of `length` along `axis`, replaced by those in `blocks`."""
    return jax.tree.map(
        lambda array, own: jax.lax.dynamic_update_slice_in_dim(array, own, number * length, axis),
        tree,
        blocks,
    )
