"""Rows of tokens, a few positions at a time."""

from typing import Any

import jax
import jax.numpy as jnp

CACHED_BYTES = 2**20
"""What an array of one block may take on a CPU: a core's second cache holds about as much."""

FEWEST_TOKENS = 64
"""Of a block; a matrix product of fewer rows waits for its matrix."""


def block_length(
    rows: int, length: int, width: int, dtype: jnp.dtype, tokens: int | None = None
) -> int:
    """How many positions of all rows to compute at a time.

    On a CPU, elementwise work on an array that its cache does not hold waits for memory, several
    times as long as it computes. Elsewhere a block is all there is, unless `tokens` says less.

    Args:
      rows: rows on one device.
      length: positions of a row.
      width: the widest array's.
      dtype: its type.
      tokens: tokens of a block; None leaves it to the platform.

    Returns:
      A divisor of `length`: `length` itself where its divisors do not come near what is wanted.
    """
    if tokens is None:
        if jax.default_backend() != "cpu":
            return length
        tokens = max(FEWEST_TOKENS, CACHED_BYTES // (width * jnp.dtype(dtype).itemsize))
    wanted = max(1, tokens // rows)
    divisors = [n for n in range(1, min(wanted, length) + 1) if length % n == 0]
    longest = divisors[-1]
    return longest if 2 * longest > wanted or longest == length else length


def take_block(tree: Any, number: jax.Array, length: int) -> Any:
    """The positions of block `number` of arrays [B, S, ...]: [B, length, ...]."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, number * length, length, axis=1), tree
    )


def put_block(tree: Any, blocks: Any, number: jax.Array, length: int) -> Any:
    """Arrays [B, S, ...] with the positions of block `number` from `blocks` [B, length, ...]."""
    return jax.tree.map(
        lambda array, own: jax.lax.dynamic_update_slice_in_dim(array, own, number * length, axis=1),
        tree,
        blocks,
    )
