"""Causal attention over padded and packed rows."""

from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.layers.activation import soft_cap
from moe_jax.layers.blocked_attention import BLOCK, BlockSettings, blocked_attention
from moe_jax.layers.kv_cache import CachePosition


def attention_mask(segment_ids: jax.Array) -> jax.Array:
    """Which positions each position may attend to, beyond causality.

    Args:
      segment_ids: int [B, S]; 0 is padding, equal numbers are one sequence.

    Returns:
      bool [B, 1, S, S], query by key: true within a sequence. Padding attends to padding, so that
      no row of the softmax is empty; no real position sees padding, on whichever side it is.
    """
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None,
    implementation: Literal["xla", "cudnn"],
    scale: float | None = None,
    window: int | None = None,
    slides: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention (arXiv:1706.03762, eq. 1) with grouped heads (arXiv:2305.13245).

    Rows longer than `BLOCK` take memory linear in their length, see
    `moe_jax.layers.blocked_attention`. The fused kernel does too, but where `segment_ids` are
    given: these it gets as a bias in half precision, [B, 1, S, S].

    Args:
      query: [B, S, H, Q].
      key: [B, S, K, Q]; each of the K heads serves H / K query heads.
      value: [B, S, K, Q].
      segment_ids: int [B, S], see `attention_mask`. None: rows are single sequences without padding
        on the left; what is padding on their right no real position sees anyway.
      implementation: see `ComputeConfig.attention`. The softmax is float32 in both.
      scale: factor of the scores; by default 1 / sqrt(Q).
      window: how many positions, its own included, each position sees (arXiv:2004.05150, 3.1).
        None is all before it.
      slides: bool [], whether the window holds, where that is known only while the program runs.
        None: it does.
      softcap: bound of the scaled scores, see `soft_cap`; `xla` only.

    Returns:
      [B, S, H, Q] in the type of `query`.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= query.shape[1]:
        window = None
    if implementation == "cudnn":
        if softcap is not None:
            raise ValueError("'cudnn' cannot cap attention scores; use 'xla'")
        return _fused_attention(query, key, value, segment_ids, factor, window, slides)
    if query.shape[1] > BLOCK:
        settings = BlockSettings(factor, softcap, window, BLOCK)
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
    # A bias is what jax's public interface has for segments, in 0.10 as in 0.12. The kernel's own
    # layout of packed rows is behind private functions, which need a Hopper GPU and, with grouped
    # heads, read wrong keys (jax issue 39521, mended after 0.10).
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
        return kernel(window)
    # The kernel leaves out what is beyond a window that it is told of, but not what a mask hides.
    return jax.lax.cond(slides, lambda: kernel(window), lambda: kernel(None))


def _within_window(distance: jax.Array, window: int, slides: jax.Array | None) -> jax.Array:
    """Bool like `distance`, which is how far back keys are: whether a window reaches them."""
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
        allowed = allowed & mask[:, :, None]
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
    """Attention of tokens that follow others, whose keys and values are in a cache.

    Its scores are [B, H, S, M + S]: it is meant for the few tokens of a step of decoding. A prompt
    of any length goes through `causal_attention`, which fills the cache.

    Args:
      query: [B, S, H, Q], of the new tokens.
      key: [B, S, K, Q], of the new tokens.
      value: [B, S, K, Q], of the new tokens.
      cached_key: [B, K, M, Q]; positions from `position.index` on are not read.
      cached_value: [B, K, M, Q].
      position: cache position of the new tokens.
      scale: factor of the scores.
      window, slides: as in `causal_attention`.
      softcap: as in `causal_attention`.

    Returns:
      [B, S, H, Q] in the type of `query`.
    """
    batch, length, heads, width = query.shape
    kv_heads, cache_length = cached_key.shape[1:3]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)

    def scores(equation: str, keys: jax.Array) -> jax.Array:
        product = jnp.einsum(equation, grouped, keys, preferred_element_type=jnp.float32) * scale
        return product if softcap is None else soft_cap(product, softcap)

    index = jnp.arange(cache_length)
    before = (index < position.index)[None] & (index[None] >= position.start[:, None])
    before = before[:, None, None, None, :]  # [B, K, G, S, M], as the scores
    new = jnp.arange(length)
    distance = new[:, None] - new[None, :]
    among = distance >= 0
    if window is not None:
        back = position.index + new[:, None] - index[None, :]
        before = before & _within_window(back, window, slides)[None, None, None]
        among = among & _within_window(distance, window, slides)
    lowest = jnp.finfo(jnp.float32).min
    both = [
        jnp.where(before, scores("bskgq,bktq->bkgst", cached_key), lowest),
        jnp.where(among[None, None, None], scores("bskgq,btkq->bkgst", key), lowest),
    ]
    probs = jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1).astype(value.dtype)
    attended = jnp.einsum("bkgst,bktq->bskgq", probs[..., :cache_length], cached_value)
    attended = attended + jnp.einsum("bkgst,btkq->bskgq", probs[..., cache_length:], value)
    return attended.reshape(query.shape)


def positions_from_segments(segment_ids: jax.Array) -> jax.Array:
    """Each token's place within its own sequence, from 0; int32 [B, S], 0 at padding.

    Args:
      segment_ids: int [B, S], as in `attention_mask`; a sequence's tokens are contiguous.
    """
    length = segment_ids.shape[-1]
    index = jnp.arange(length, dtype=jnp.int32)
    previous = jnp.pad(segment_ids[..., :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segment_ids != previous, index, 0)
    positions = index - jax.lax.cummax(starts, axis=segment_ids.ndim - 1)
    return jnp.where(segment_ids == 0, 0, positions)
