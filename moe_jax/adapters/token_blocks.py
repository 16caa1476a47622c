"""Token-wise functions computed block by block, for CPUs.

On a CPU, elementwise work on an array that the second-level cache does not hold waits for memory
for several times as long as it computes. In blocks, the hidden activations of MixLoRA's slots stay
in the cache, and the backward pass recomputes one block at a time. On accelerators one block of all
tokens is best: XLA fuses the same work into its kernels. `cpu_block_tokens` is called in one place,
where the training program is built for its devices (`moe_jax.training.step.program`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CACHE_BYTES = 2**20
"""Bytes of the widest array of a block: about the size of a core's second-level cache."""

SMALLEST_BLOCK = 64
"""Tokens; a matrix product of fewer rows is bound by memory bandwidth."""


def cpu_block_tokens(width: int, dtype: Any) -> int:
    """Number of tokens per block, so that an array [tokens, width] of `dtype` fits the cache."""
    return max(SMALLEST_BLOCK, CACHE_BYTES // (width * jnp.dtype(dtype).itemsize))


def block_length(tokens: int, largest: int) -> int:
    """Largest divisor of `tokens` up to `largest`; `tokens`, one block, if it is below `largest` /
    2.
    """
    block = max(n for n in range(1, min(largest, tokens) + 1) if tokens % n == 0)
    return block if 2 * block > largest else tokens


def map_token_blocks(
    function: Callable[[Any, Any], Any],
    tokens: Any,
    shared: Any,
    block_tokens: int,
    shards: int = 1,
) -> Any:
    """Computes `function(tokens, shared)` block by block, and each block again in the backward
    pass.

    Args:
      function: maps arrays [T, ...] to arrays [T, ...], each token independently of the others.
      tokens: tree of arrays with the tokens as their leading axis.
      shared: tree of arrays that all tokens share.
      block_tokens: largest number of a device's tokens in a block; see `block_length`. If one
        block holds all tokens, the function is called as it is.
      shards: number of devices, or groups of them, that the rows are divided over. A block takes
        the same share of each shard's tokens, so that no token moves between devices.
    """
    total = jax.tree.leaves(tokens)[0].shape[0]
    per_shard = total // shards
    block = block_length(per_shard, block_tokens)
    count = per_shard // block
    if count == 1:
        return function(tokens, shared)

    def split(array: jax.Array) -> jax.Array:
        blocks = array.reshape(shards, count, block, *array.shape[1:])
        return jnp.swapaxes(blocks, 0, 1).reshape(count, shards * block, *array.shape[1:])

    def join(array: jax.Array) -> jax.Array:
        blocks = array.reshape(count, shards, block, *array.shape[2:])
        return jnp.swapaxes(blocks, 0, 1).reshape(total, *array.shape[2:])

    run = jax.checkpoint(lambda block: function(block, shared))
    return jax.tree.map(join, jax.lax.map(run, jax.tree.map(split, tokens)))
