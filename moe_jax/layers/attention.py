"""Causal attention over padded and packed rows."""

from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.layers.kv_cache import CachePlace
from moe_jax.layers.soft_cap import soft_cap


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
    mask: jax.Array | None,
    implementation: Literal["xla", "cudnn"],
    scale: float | None = None,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention (arXiv:1706.03762, eq. 1) with grouped heads (arXiv:2305.13245).

    Args:
      query: [B, S, H, Q].
      key: [B, S, K, Q]; each of the K heads serves H / K query heads.
      value: [B, S, K, Q].
      mask: bool [B, 1, S, S] on top of causality, or None.
      implementation: see `ComputeConfig.attention`. The softmax is float32 in both.
      scale: factor of the scores; by default 1 / sqrt(Q).
      window: how many positions, its own included, each position sees (arXiv:2004.05150, 3.1); an
        array [] where that is known only while the program runs. None is all before it.
      softcap: bound of the scaled scores, see `soft_cap`; `xla` only.

    Returns:
      [B, S, H, Q] in the type of `query`.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(window, int) and window >= query.shape[1]:
        window = None
    if implementation == "xla":
        return _einsum_attention(query, key, value, mask, factor, window, softcap)
    if softcap is not None:
        raise ValueError("'cudnn' cannot cap attention scores; use 'xla'")
    local_window_size = None
    if isinstance(window, int):  # the kernel skips what is beyond it
        local_window_size = (window - 1, 0)
    elif window is not None:
        within = _within_window(query.shape[1], window)[None, None]
        mask = within if mask is None else mask & within
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=factor,
        is_causal=True,
        local_window_size=local_window_size,
        implementation="cudnn",
    )


def _within_window(length: int, window: int | jax.Array) -> jax.Array:
    """Bool [S, S], query by key: true where the key is fewer than `window` positions back."""
    index = jnp.arange(length)
    return index[:, None] - index[None, :] < window


def _einsum_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    scale: float,
    window: int | jax.Array | None,
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
    allowed = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        allowed = allowed & _within_window(length, window)
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
    place: CachePlace,
    *,
    scale: float,
    window: int | jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The same for tokens that follow others, whose keys and values are in a cache.

    Args:
      query: [B, S, H, Q], of the new tokens.
      key: [B, S, K, Q], of the new tokens.
      value: [B, S, K, Q], of the new tokens.
      cached_key: [B, K, M, Q]; slots from `place.slot` on are not read.
      cached_value: [B, K, M, Q].
      place: where the new tokens stand.
      scale: factor of the scores.
      window: as in `causal_attention`.
      softcap: as in `causal_attention`.

    Returns:
      [B, S, H, Q] in the type of `query`.
    """
    batch, length, heads, width = query.shape
    kv_heads, slots = cached_key.shape[1:3]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)

    def scores(equation: str, keys: jax.Array) -> jax.Array:
        product = jnp.einsum(equation, grouped, keys, preferred_element_type=jnp.float32) * scale
        return product if softcap is None else soft_cap(product, softcap)

    slot = jnp.arange(slots)
    before = (slot < place.slot) & (slot >= place.start[:, None])
    before = before[:, None, None, None, :]  # [B, K, G, S, M], as the scores
    among = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        own = place.slot + jnp.arange(length)
        before = before & (own[:, None] - slot[None, :] < window)
        among = among & _within_window(length, window)
    lowest = jnp.finfo(jnp.float32).min
    both = [
        jnp.where(before, scores("bskgq,bktq->bkgst", cached_key), lowest),
        jnp.where(among, scores("bskgq,btkq->bkgst", key), lowest),
    ]
    probs = jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1).astype(value.dtype)
    attended = jnp.einsum("bkgst,bktq->bskgq", probs[..., :slots], cached_value)
    attended = attended + jnp.einsum("bkgst,btkq->bskgq", probs[..., slots:], value)
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
