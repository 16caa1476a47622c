"""Causal attention of long rows in square blocks of scores, in memory linear in their length.

The scores of a block of queries and a block of keys are discarded after use. The backward pass
computes them again from the inputs, the result and the log-sum-exp of each query (FlashAttention,
arXiv:2205.14135, algorithms 1 and 4). Blocks whose keys all come after their queries, about half of
all, and blocks outside the window are skipped.

The blocks are the iterations of a loop. In an unrolled program, XLA would compute independent
blocks at the same time and hold the scores of all of them.

Letters, besides those of `moe_jax.layers`: n blocks of a row, b positions of a block, G = H / K
query heads for each key head.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.layers.activation import soft_cap
from moe_jax.layers.names import ATTENTION
from moe_jax.layers.tokens import in_sequence

BLOCK = 256
"""Maximum positions of a block. The scores of 32 heads then take 8 MiB for each row of a batch."""

GPU_BLOCK = 1024
"""Maximum positions of a block on GPUs, where each iteration launches some twenty kernels. The
scores of 32 heads take 128 MiB for each row of a batch."""

_LOWEST = float(jnp.finfo(jnp.float32).min)


class BlockSettings(NamedTuple):
    """Static settings of blocked attention.

    Attributes:
      scale: factor of the scores.
      softcap: bound of the scaled scores, see `soft_cap`, or None.
      window: number of positions that each attends to, itself included, or None.
      block: maximum positions of a block.
      gpu_block: the same in programs for NVIDIA GPUs; None for `block`.
    """

    scale: float
    softcap: float | None
    window: int | None
    block: int
    gpu_block: int | None = None


class _Blocks(NamedTuple):
    """Inputs of attention in blocks; the block is the first axis.

    Attributes:
      query: [n, B, K, G, b, Q].
      key, value: [n, B, K, b, Q].
      segment_ids: int [n, B, b], or None.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    segment_ids: jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_attention(
    settings: BlockSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    slides: jax.Array | None,
) -> jax.Array:
    """Softmax attention of each position to itself and those before it.

    Args:
      settings: static settings.
      query: [B, S, H, Q].
      key: [B, S, K, Q].
      value: [B, S, K, Q].
      segment_ids: int [B, S], see `moe_jax.layers.attention.attention_mask`. None: each row is a
        single sequence.
      slides: bool [], true if the window applies; None means true. Only the blocks that it leaves
        are computed.

    Returns:
      [B, S, H, Q] in the dtype of `query`.
    """
    return _forward(settings, query, key, value, segment_ids, slides)[0]


def _forward(
    settings: BlockSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    slides: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    inputs = (query, key, value, segment_ids, slides)
    attended, log_sums = _with_blocks_of_platform(_attend_rows, settings, *inputs)
    attended = checkpoint_name(attended, ATTENTION)
    log_sums = checkpoint_name(log_sums, ATTENTION)
    return attended, (*inputs, attended, log_sums)


def _backward(
    settings: BlockSettings, residuals: tuple[Any, ...], cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    gradients = _with_blocks_of_platform(_gradients_of_rows, settings, *residuals, cotangent)
    return (*gradients, None, None)


blocked_attention.defvjp(_forward, _backward)


def _with_blocks_of_platform(
    function: Callable[..., Any], settings: BlockSettings, *args: Any
) -> Any:
    """`function(settings, *args)` with the blocks of the platform that the program is made for."""
    if settings.gpu_block is None:
        return function(settings, *args)
    on_gpu = partial(function, settings._replace(block=settings.gpu_block))
    return jax.lax.platform_dependent(*args, cuda=on_gpu, default=partial(function, settings))


def _attend_rows(
    settings: BlockSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    slides: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The result [B, S, H, Q], and the log-sum-exp of each query, float32 [B, S, H]."""
    blocks = _split(settings, query, key, value, segment_ids)
    attended, log_sums = _with_or_without_window(_attend, settings, slides, blocks)
    log_sums = _join_heads(log_sums[..., None], (*query.shape[:-1], 1))[..., 0]
    return _join_heads(attended, query.shape), log_sums


def _gradients_of_rows(
    settings: BlockSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    slides: jax.Array | None,
    attended: jax.Array,
    log_sums: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value; `attended` and `log_sums` are from `_attend_rows`."""
    blocks = _split(settings, query, key, value, segment_ids)
    # The softmax subtracts sum_t p_t dp_t = attended . cotangent from each gradient.
    inner = jnp.sum(attended.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    inner, log_sums = (
        _split_heads(x[..., None], len(blocks.key), key.shape[2])[..., 0] for x in (inner, log_sums)
    )
    upper = _split_heads(cotangent, len(blocks.key), key.shape[2])
    d_query, d_key, d_value = _with_or_without_window(
        _gradients, settings, slides, blocks, log_sums, upper, inner
    )
    return (
        _join_heads(d_query, query.shape),
        _join_heads(d_key[:, :, :, None], key.shape),
        _join_heads(d_value[:, :, :, None], value.shape),
    )


def _with_or_without_window(
    function: Callable[..., Any], settings: BlockSettings, slides: jax.Array | None, *args: Any
) -> Any:
    if slides is None or settings.window is None:
        return function(settings, *args)
    everything = settings._replace(window=None)
    return jax.lax.cond(slides, partial(function, settings), partial(function, everything), *args)


def _attend(settings: BlockSettings, blocks: _Blocks) -> tuple[jax.Array, jax.Array]:
    """The result [n, B, K, G, b, Q] and the log-sum-exp of each query, float32 [n, B, K, G, b]."""

    def step(totals: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        i, j = pair[0], pair[1]
        largest, total, attended = (_at(array, i) for array in totals)
        scores, allowed = _scores(settings, blocks, i, j)
        scores = jnp.where(allowed, scores, _LOWEST)
        # Before the first block with a key of the query's sequence, the sums are meaningless. That
        # key's larger score then sets their factor to 0; every query has one, itself.
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
        shares = jnp.exp(scores - new_largest[..., None])
        factor = jnp.exp(largest - new_largest)
        total = factor * total + jnp.sum(shares, axis=-1)
        value = _at(blocks.value, j)
        attended = factor[..., None] * attended
        attended += _product("bkgst,bktq->bkgsq", shares.astype(value.dtype), value)
        new = (new_largest, total, attended)
        return tuple(map(partial(_put, index=i), totals, new)), None

    rows = blocks.query.shape[:-1]
    totals = (
        jnp.full(rows, _LOWEST, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(blocks.query.shape, jnp.float32),
    )
    (largest, total, attended), _ = jax.lax.scan(step, totals, _pairs(settings, blocks))
    attended = (attended / total[..., None]).astype(blocks.query.dtype)
    return attended, largest + jnp.log(total)


def _gradients(
    settings: BlockSettings,
    blocks: _Blocks,
    log_sums: jax.Array,
    upper: jax.Array,
    inner: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, in their dtypes.

    Args:
      settings: static settings.
      blocks: inputs in blocks.
      log_sums: log-sum-exps from `_attend`.
      upper: gradient of the result, [n, B, K, G, b, Q].
      inner: product of that gradient with the result, float32 [n, B, K, G, b].
    """

    def step(totals: tuple[jax.Array, ...], pair: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        i, j = pair[0], pair[1]
        d_query, d_key, d_value = totals
        query, key, value = _at(blocks.query, i), _at(blocks.key, j), _at(blocks.value, j)
        scores, allowed = _scores(settings, blocks, i, j)
        probs = jnp.where(allowed, jnp.exp(scores - _at(log_sums, i)[..., None]), 0.0)
        above = _at(upper, i)
        part = _product("bkgst,bkgsq->bktq", probs.astype(value.dtype), above)
        d_value = _put(d_value, _at(d_value, j) + part, j)
        d_probs = _product("bkgsq,bktq->bkgst", above, value)
        d_scores = probs * (d_probs - _at(inner, i)[..., None])
        if settings.softcap is not None:
            d_scores *= 1 - jnp.square(scores / settings.softcap)
        d_scores = (d_scores * settings.scale).astype(query.dtype)
        part = _product("bkgst,bktq->bkgsq", d_scores, key)
        d_query = _put(d_query, _at(d_query, i) + part, i)
        part = _product("bkgst,bkgsq->bktq", d_scores, query)
        d_key = _put(d_key, _at(d_key, j) + part, j)
        return (d_query, d_key, d_value), None

    inputs = (blocks.query, blocks.key, blocks.value)
    totals = tuple(jnp.zeros(array.shape, jnp.float32) for array in inputs)
    (d_query, d_key, d_value), _ = jax.lax.scan(step, totals, _pairs(settings, blocks))
    dtype = blocks.query.dtype
    return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype)


def block_pairs(count: int, size: int, window: int | None) -> list[tuple[int, int]]:
    """Pairs of a query block and a key block whose scores are computed, by query block.

    Args:
      count: n.
      size: b.
      window: number of positions that each attends to, itself included, or None.
    """
    reach = count if window is None else -(-(window - 1) // size)
    return [(i, j) for i in range(count) for j in range(max(0, i - reach), i + 1)]


def _pairs(settings: BlockSettings, blocks: _Blocks) -> jax.Array:
    """Iterations of the loop, int32 [pairs, 2]."""
    pairs = block_pairs(len(blocks.key), blocks.key.shape[-2], settings.window)
    return jnp.array(pairs, jnp.int32)


def _scores(
    settings: BlockSettings, blocks: _Blocks, i: jax.Array, j: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scaled and capped scores, float32 [B, K, G, b, b], and the mask of valid ones."""
    scores = _product("bkgsq,bktq->bkgst", _at(blocks.query, i), _at(blocks.key, j))
    scores = scores * settings.scale
    if settings.softcap is not None:
        scores = soft_cap(scores, settings.softcap)
    size = scores.shape[-1]
    index = jnp.arange(size)
    distance = (i - j) * size + index[:, None] - index[None, :]
    allowed = distance >= 0
    if settings.window is not None:
        allowed &= distance < settings.window
    if blocks.segment_ids is not None:
        queries, keys = (_at(blocks.segment_ids, index) for index in (i, j))
        same = in_sequence(queries[:, :, None], keys[:, None, :])
        allowed = allowed[None, None, None] & same[:, None, None]
    return scores, allowed


def _split(
    settings: BlockSettings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
) -> _Blocks:
    count, kv_heads = -(-query.shape[1] // settings.block), key.shape[2]
    query, key, value = (_split_heads(x, count, kv_heads) for x in (query, key, value))
    if segment_ids is not None:
        segment_ids = jnp.moveaxis(_split_length(segment_ids, count), 1, 0)
    return _Blocks(query, key[:, :, :, 0], value[:, :, :, 0], segment_ids)


def _split_length(x: jax.Array, count: int) -> jax.Array:
    """[B, S, ...] to [B, n, b, ...]; pads S so that all blocks have the same length.

    The padding comes last, where causality hides it.
    """
    size = -(-x.shape[1] // count)
    rest = count * size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, rest), *((0, 0) for _ in x.shape[2:])))
    return x.reshape(x.shape[0], count, size, *x.shape[2:])


def _split_heads(x: jax.Array, count: int, kv_heads: int) -> jax.Array:
    """[B, S, H, Q] to [n, B, K, G, b, Q]."""
    x = _split_length(x, count)
    x = x.reshape(*x.shape[:3], kv_heads, -1, x.shape[-1])
    return x.transpose(1, 0, 3, 4, 2, 5)


def _join_heads(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[n, B, K, G, b, Q] to [B, S, H, Q], which is `shape`."""
    x = x.transpose(1, 0, 4, 2, 3, 5)
    length = math.prod(x.shape[1:3])
    return x.reshape(shape[0], length, *shape[2:])[:, : shape[1]]


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)


def _put(array: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, new, index, 0)
