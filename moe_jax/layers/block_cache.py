"""A cache of keys and values in blocks, for rows that join and leave a batch.

The blocks of all rows are one pool, and a table names those of each row (vLLM's paged attention,
arXiv:2309.06180, section 4.1). Attention reads group after group of blocks, up to the end of the
longest row of the call, and keeps a running softmax (arXiv:2205.14135, algorithm 1). One program
therefore serves rows of all lengths, and short rows do not pay for the length that a row may have.

A layer reads the pool and never writes it: the pool is an input of all layers, which the scan over
layers does not copy. The keys and values of new tokens leave the layers in `cache_updates`, and
`write_blocks` then writes them in place.

Letters, besides those of `moe_jax.layers`: P blocks of the pool, M positions of a block, N entries
of a table, each a group of n blocks, G = H / K query heads for each key head, T keys.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.activation import soft_cap
from moe_jax.layers.kv_cache import BY_POSITION, heads_first, write_cache
from moe_jax.sharding.axes import BATCH, CACHE_KV_HEADS, HEAD_WIDTH, LENGTH, constrain

SPARE_BLOCK = 0
"""Block that no row owns; what is written for padding goes there."""

_UPDATE_AXES = (BATCH, CACHE_KV_HEADS, LENGTH, HEAD_WIDTH)
_LOWEST = float(jnp.finfo(jnp.float32).min)


class BlockPool(NamedTuple):
    """Keys and values of all blocks and layers, each [L, P, K, M, Q]."""

    key: jax.Array
    value: jax.Array


class BlockPosition(NamedTuple):
    """Earlier tokens of the rows of a call.

    Attributes:
      pool: the blocks.
      tables: int32 [B, N, n], the blocks of each row in the order of its positions; unused entries
        are `SPARE_BLOCK`. Attention reads the n blocks of a group at once.
      lengths: int32 [B], number of tokens of each row in the cache.
      prompt_length: int32 [B], number of tokens of the row's whole prompt where the call has a part
        of it, and of all tokens so far afterwards.
    """

    pool: BlockPool
    tables: jax.Array
    lengths: jax.Array
    prompt_length: jax.Array


class _Softmax(NamedTuple):
    """A softmax over some of the keys; float32.

    Attributes:
      largest: [B, K, G, S], largest score.
      total: [B, K, G, S], sum of the exponentials of scores minus `largest`.
      attended: [B, K, G, S, Q], values weighted by these exponentials.
    """

    largest: jax.Array
    total: jax.Array
    attended: jax.Array


def add_to_blocks(module: nn.Module, key: jax.Array, value: jax.Array) -> None:
    """Gives the keys and values [B, S, K, Q] of new tokens to `write_blocks`."""
    for name, array in zip(BY_POSITION, (key, value), strict=True):
        write_cache(module, name, constrain(heads_first(array), _UPDATE_AXES))


def block_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    token_mask: jax.Array,
    position: BlockPosition,
    layer_index: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    slides: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of new tokens to earlier ones in blocks, to themselves and to those between.

    Args:
      query: [B, S, H, Q] of the new tokens.
      key, value: [B, S, K, Q] of the new tokens.
      token_mask: bool [B, S], false at padding, which follows a row's tokens.
      position: the earlier tokens.
      layer_index: int32 [].
      scale, window, slides, softcap: as in `causal_attention`.

    Returns:
      [B, S, H, Q] in the dtype of `query`.
    """
    batch, length, heads, width = query.shape
    groups = (key.shape[2], heads // key.shape[2])
    grouped = query.reshape(batch, length, *groups, width).transpose(0, 2, 3, 1, 4)
    span = _span(position)
    new = jnp.arange(length)
    query_positions = position.lengths[:, None] + new[None]  # [B, S]

    def scores(keys: jax.Array, key_positions: jax.Array, mask: jax.Array) -> jax.Array:
        """Scores [B, K, G, S, T] of keys [B, K, T, Q] at positions [B, T], masked [B, S, T]."""
        product = jnp.einsum("bkgsq,bktq->bkgst", grouped, keys, preferred_element_type=jnp.float32)
        product = product * scale
        product = product if softcap is None else soft_cap(product, softcap)
        if window is not None:
            within = query_positions[:, :, None] - key_positions[:, None] < window
            mask = mask & (within if slides is None else within | ~slides)
        return jnp.where(mask[:, None, None], product, _LOWEST)

    # A row of padding attends to itself, so that its softmax is not empty.
    own = (new[:, None] >= new[None])[None] & token_mask[:, None]
    own = own | (new[:, None] == new[None])[None]
    # Zeros, since a weight of zero does not hide what is not finite.
    own_values = heads_first(jnp.where(token_mask[..., None, None], value, 0))
    softmax = _softmax_of(scores(heads_first(key), query_positions, own), own_values)

    def add_group(index: jax.Array, softmax: _Softmax) -> _Softmax:
        blocks = position.tables[:, index]
        keys, values = (_side_by_side(part[layer_index, blocks]) for part in position.pool)
        positions = jnp.broadcast_to(index * span + jnp.arange(span)[None], (batch, span))
        is_known = positions < position.lengths[:, None]
        values = jnp.where(is_known[:, None, :, None], values, 0)
        return _joined(softmax, _softmax_of(scores(keys, positions, is_known[:, None]), values))

    count = (jnp.max(position.lengths) + span - 1) // span
    start = _first_group(token_mask, position, window, slides)
    softmax = jax.lax.fori_loop(start, count, add_group, softmax)
    attended = softmax.attended / softmax.total[..., None]
    return attended.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)


def _span(position: BlockPosition) -> int:
    """Number of positions of a group of blocks."""
    return position.tables.shape[2] * position.pool.key.shape[3]


def _side_by_side(blocks: jax.Array) -> jax.Array:
    """The blocks [B, n, K, M, Q] of a group as [B, K, n M, Q]."""
    batch, count, heads, block, width = blocks.shape
    return blocks.transpose(0, 2, 1, 3, 4).reshape(batch, heads, count * block, width)


def _first_group(
    token_mask: jax.Array, position: BlockPosition, window: int | None, slides: jax.Array | None
) -> jax.Array:
    """Index of the first group of blocks that a token of any row sees."""
    if window is None:
        return jnp.int32(0)
    lengths, is_used = position.lengths, jnp.any(token_mask, axis=1)
    shortest = jnp.min(jnp.where(is_used, lengths, jnp.max(lengths)))
    first = jnp.maximum(shortest - window + 1, 0) // _span(position)
    return first if slides is None else jnp.where(slides, first, 0)


def _softmax_of(scores: jax.Array, values: jax.Array) -> _Softmax:
    """Softmax of scores [B, K, G, S, T], applied to values [B, K, T, Q]."""
    largest = jnp.max(scores, axis=-1)
    exponentials = jnp.exp(scores - largest[..., None])
    attended = jnp.einsum(
        "bkgst,bktq->bkgsq",
        exponentials.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return _Softmax(largest, jnp.sum(exponentials, axis=-1), attended)


def _joined(one: _Softmax, other: _Softmax) -> _Softmax:
    """Softmax over the keys of both. A part without any visible key has no weight."""
    largest = jnp.maximum(one.largest, other.largest)
    weights = [jnp.exp(part.largest - largest) for part in (one, other)]
    return _Softmax(
        largest,
        one.total * weights[0] + other.total * weights[1],
        one.attended * weights[0][..., None] + other.attended * weights[1][..., None],
    )


def write_blocks(
    pool: BlockPool, updates: BlockPool, tables: jax.Array, lengths: jax.Array, mask: jax.Array
) -> BlockPool:
    """The pool with the keys and values of a call's tokens.

    It belongs into a program of its own, which may write in place: in one program with the loops of
    attention, XLA for CPUs (jaxlib 0.10) copies the pool before it writes.

    Args:
      pool: the pool before the call.
      updates: keys and values of its tokens, each [L, B, K, S, Q].
      tables, lengths: see `BlockPosition`.
      mask: bool [B, S], false at padding.
    """
    tables = tables.reshape(len(tables), -1)
    block = pool.key.shape[3]
    positions = lengths[:, None] + jnp.arange(mask.shape[1])[None]
    entries = jnp.minimum(positions // block, tables.shape[1] - 1)
    blocks = jnp.where(mask, jnp.take_along_axis(tables, entries, axis=1), SPARE_BLOCK)

    def written(array: jax.Array, new: jax.Array) -> jax.Array:
        # The two index arrays [B, S] are not adjacent, so that their axes come first.
        by_token = new.transpose(1, 3, 0, 2, 4)
        return array.at[:, blocks, :, positions % block].set(by_token)

    return BlockPool(*map(written, pool, updates))


def position_updates(updates: Any) -> BlockPool:
    """Keys and values of new tokens in the collection `cache_updates`, each [L, B, K, S, Q]."""
    found = updates["layers"]["self_attn"]
    return BlockPool(*(found[name] for name in BY_POSITION))
