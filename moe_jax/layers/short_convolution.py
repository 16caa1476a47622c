"""The short causal convolution of linear attention: each channel by itself, within sequences."""

import jax
import jax.numpy as jnp


def causal_convolution(
    x: jax.Array,
    filters: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    before: jax.Array | None = None,
) -> jax.Array:
    """Convolves each channel with its filter, whose last entry belongs to the token itself.

    Args:
      x: [B, S, C].
      filters: [C, W].
      segment_ids: int [B, S] as in `Batch`: tokens of other sequences count as zeros. None: each
        row is a single sequence.
      before: [B, W - 1, C], tokens before the first; None for zeros.

    Returns:
      float32 [B, S, C].
    """
    length, width = x.shape[1], filters.shape[1]
    if before is None:
        before = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    inputs = jnp.concatenate([before, x], axis=1).astype(jnp.float32)
    taps = filters.astype(jnp.float32)
    result = x.astype(jnp.float32) * taps[None, None, :, -1]
    for distance in range(1, width):
        start = width - 1 - distance
        shifted = inputs[:, start : start + length]
        if segment_ids is not None:
            earlier = jnp.pad(segment_ids, ((0, 0), (distance, 0)), constant_values=-1)[:, :length]
            shifted = jnp.where((earlier == segment_ids)[..., None], shifted, 0.0)
        result = result + shifted * taps[None, None, :, -1 - distance]
    return result


def last_inputs(x: jax.Array, count: int, segment_ids: jax.Array | None) -> jax.Array:
    """The last `count` tokens [B, count, C] of the sequence that ends each row; zeros before it.

    Args:
      x: [B, S, C].
      count: number of tokens.
      segment_ids: as in `causal_convolution`.
    """
    if segment_ids is not None:
        x = jnp.where((segment_ids == segment_ids[:, -1:])[..., None], x, jnp.zeros((), x.dtype))
    return jnp.pad(x, ((0, 0), (count, 0), (0, 0)))[:, x.shape[1] :]
