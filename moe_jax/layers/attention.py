"""Causal attention over padded and packed rows."""

from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.layers.activation import soft_cap
from moe_jax.layers.blocked_attention import (
    BLOCK,
    GPU_BLOCK,
    BlockSettings,
    blocked_attention,
)
from moe_jax.layers.kv_cache import CachePosition
from moe_jax.layers.tokens import in_sequence


def attention_mask(segment_ids: jax.Array) -> jax.Array:
    """Mask that separates the sequences of packed rows; it is not causal by itself.

    Args:
      segment_ids: int [B, S]; 0 is padding, equal numbers are one sequence. A branch also attends
        to the sequence that it continues, see `moe_jax.layers.tokens.BRANCH`.

    Returns:
      bool [B, 1, S, S], query by key: true within a sequence. Padding attends to padding, so that
      no row of the softmax is empty. No real position attends to padding, on either side.
    """
    return in_sequence(segment_ids[:, None, :, None], segment_ids[:, None, None, :])


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None,
    implementation: Literal["auto", "xla", "cudnn"],
    scale: float | None = None,
    window: int | None = None,
    slides: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention (arXiv:1706.03762, eq. 1) with grouped heads (arXiv:2305.13245).

    Rows longer than `BLOCK` take memory linear in their length, see
    `moe_jax.layers.blocked_attention`. So does the fused kernel, unless `segment_ids` are given:
    it takes them as a bias [B, 1, S, S] in half precision.

    Args:
      query: [B, S, H, Q].
      key: [B, S, K, Q]; each of the K heads serves H / K query heads.
      value: [B, S, K, Q].
      segment_ids: int [B, S], see `attention_mask`. None: each row is a single sequence, padded on
        the right at most; causality hides that padding.
      implementation: see `ComputeConfig.attention`; `auto` is `xla` here, where the devices are not
        known. The softmax is float32 in both.
      scale: factor of the scores; by default 1 / sqrt(Q).
      window: number of positions that each position attends to, itself included
        (arXiv:2004.05150, section 3.1); None for all before it.
      slides: bool [], true if the window applies; for a scan over layers with and without windows.
        None means true.
      softcap: bound of the scaled scores, see `soft_cap`; `xla` only.

    Returns:
      [B, S, H, Q] in the dtype of `query`.

    Raises:
      ValueError: `softcap` is set and the implementation is 'cudnn'.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= query.shape[1]:
        window = None
    if implementation == "cudnn":
        if softcap is not None:
            raise ValueError("'cudnn' cannot cap attention scores; use 'xla'")
        return _fused_attention(query, key, value, segment_ids, factor, window, slides)
    if query.shape[1] > BLOCK:
        # Blocks larger than the window would compute more scores outside it than within.
        gpu_block = GPU_BLOCK if window is None else min(GPU_BLOCK, max(BLOCK, window))
        settings = BlockSettings(factor, softcap, window, BLOCK, gpu_block)
        return blocked_attention(settings, query, key, value, segment_ids, slides)
    mask = None if segment_ids is None else attention_mask(segment_ids)
    return _einsum_attention(query, key, value, mask, factor, window, slides, softcap)


def _fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    window: int | None,
    slides: jax.Array | None,
) -> jax.Array:
    # JAX's public API takes segments only as a mask, which becomes a bias (0.10 to 0.12). The
    # kernel's packed layout is private, needs a Hopper GPU, and reads wrong keys with grouped heads
    # (jax issue 39521, fixed after 0.10).
    length = query.shape[1]
    if length % 2:  # refused by jax if there are gradients; causality hides the padding
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)
        )
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, 1)))
    mask = None if segment_ids is None else attention_mask(segment_ids)

    def kernel(window: int | None) -> jax.Array:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )

    if slides is None or window is None:
        attended = kernel(window)
    else:
        # With a static window the kernel skips the scores outside it; with a mask it computes them.
        attended = jax.lax.cond(slides, lambda: kernel(window), lambda: kernel(None))
    return attended[:, :length]


def _within_window(distance: jax.Array, window: int, slides: jax.Array | None) -> jax.Array:
    """Mask of the keys within the window, bool like `distance` from the query back to the key."""
    within = distance < window
    return within if slides is None else within | jnp.logical_not(slides)


def _einsum_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    scale: float,
    window: int | None,
    slides: jax.Array | None,
    softcap: float | None,
) -> jax.Array:
    # Not `jax.nn.dot_product_attention`: its XLA path has no float16 on CPU (jax 0.10).
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("bskgq,btkq->bkgst", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * scale
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    index = jnp.arange(length)
    distance = index[:, None] - index[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & _within_window(distance, window, slides)
    if mask is not None:
        allowed = allowed[None, None, None] & mask[:, :, None]
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bkgst,btkq->bskgq", probs, value)
    return attended.reshape(query.shape)


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cached_key: jax.Array,
    cached_value: jax.Array,
    position: CachePosition,
    *,
    scale: float,
    window: int | None = None,
    slides: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of new tokens to themselves and to cached keys and values.

    The scores are [B, H, S, M + S], so that it suits the few tokens of a decoding step. Prompts go
    through `causal_attention`, and fill the cache.

    Args:
      query: [B, S, H, Q] of the new tokens.
      key: [B, S, K, Q] of the new tokens.
      value: [B, S, K, Q] of the new tokens.
      cached_key: [B, K, M, Q]; positions from `position.offset` on are masked.
      cached_value: [B, K, M, Q].
      position: cache position of the new tokens.
      scale: factor of the scores.
      window, slides: as in `causal_attention`.
      softcap: as in `causal_attention`.

    Returns:
      [B, S, H, Q] in the dtype of `query`.
    """
    batch, length, heads, width = query.shape
    kv_heads, cache_length = cached_key.shape[1:3]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)

    def scaled_product(equation: str, keys: jax.Array) -> jax.Array:
        product = jnp.einsum(equation, grouped, keys, preferred_element_type=jnp.float32) * scale
        return product if softcap is None else soft_cap(product, softcap)

    index = jnp.arange(cache_length)
    cache_mask = (index < position.offset)[None] & (index[None] >= position.start[:, None])
    cache_mask = cache_mask[:, None, None, None, :]  # [B, K, G, S, M], as the scores
    new = jnp.arange(length)
    distance = new[:, None] - new[None, :]
    new_mask = distance >= 0
    if window is not None:
        cache_distance = position.offset + new[:, None] - index[None, :]
        cache_mask = cache_mask & _within_window(cache_distance, window, slides)[None, None, None]
        new_mask = new_mask & _within_window(distance, window, slides)
    lowest = jnp.finfo(jnp.float32).min
    scores = [
        jnp.where(cache_mask, scaled_product("bskgq,bktq->bkgst", cached_key), lowest),
        jnp.where(new_mask[None, None, None], scaled_product("bskgq,btkq->bkgst", key), lowest),
    ]
    probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(value.dtype)
    attended = jnp.einsum("bkgst,bktq->bskgq", probs[..., :cache_length], cached_value)
    attended = attended + jnp.einsum("bkgst,btkq->bskgq", probs[..., cache_length:], value)
    return attended.reshape(query.shape)


def positions_from_segments(segment_ids: jax.Array) -> jax.Array:
    """Position of each token in its sequence, from 0; int32 [B, S], 0 at padding.

    Args:
      segment_ids: int [B, S], as in `attention_mask`; a sequence's tokens are contiguous.
    """
    last = segment_ids.ndim - 1
    index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, last)
    previous = jnp.pad(segment_ids[..., :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    positions = index - jax.lax.cummax(starts, axis=last)
    return jnp.where(segment_ids == 0, 0, positions)
