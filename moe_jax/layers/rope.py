"""Rotary position embeddings, in the conventions of Hugging Face's checkpoints.

Channel i is rotated together with channel i + N/2 by the angle `position * inv_freq[i]`, as in
Llama's checkpoints; with `RopeConfig.interleaved`, channel 2i with channel 2i + 1. The frequency
rules are those of transformers' `modeling_rope_utils`. To add a rule, write its function, add it to
`ROPE_TYPES`, and its name to `RopeConfig.rope_type`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.rope import RopeConfig
from moe_jax.errors import ConfigError

# Defaults of the YaRN paper for the Llama family (arXiv:2309.00071, section 3.2), which checkpoints
# omit.
YARN_BETA_FAST = 32.0
YARN_BETA_SLOW = 1.0

# (config, rotated channels, max_position_embeddings, positions) -> (inv_freq, attention_scaling)
FrequencyRule = Callable[[RopeConfig, int, int, jax.Array], tuple[np.ndarray | jax.Array, float]]


def _wavelength_scales(config: RopeConfig, head_dim: int) -> np.ndarray:
    """theta^(2i / head_dim), `[head_dim / 2]` float32, rounded once.

    The rules below compute in float32 and in transformers' order of operations: an error of one
    unit in the last place of an inverse frequency is 0.006 rad at position 100 000.
    """
    exponents = (np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)).astype(
        np.float64
    )
    return (config.rope_theta**exponents).astype(np.float32)


def _default(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[np.ndarray, float]:
    """RoFormer, arXiv:2104.09864, section 3.2.2."""
    del max_position_embeddings, positions
    return np.float32(1.0) / _wavelength_scales(config, head_dim), 1.0


def _linear(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[np.ndarray, float]:
    """Position interpolation, arXiv:2306.15595: all positions are divided by `factor`."""
    inv_freq, scaling = _default(config, head_dim, max_position_embeddings, positions)
    return inv_freq / np.float32(config.factor), scaling


def _dynamic(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[np.ndarray | jax.Array, float]:
    """NTK-aware scaling that grows with the longest sequence of the batch.

    With length = max(positions) + 1, theta is multiplied by g^(d / (d-2)), where
    g = factor * length / max_position_embeddings - (factor - 1). Up to `max_position_embeddings` it
    is exactly the default rule. It depends on the positions of the call only; transformers keeps
    the longest length seen until a call is shorter than `max_position_embeddings`.
    """
    if head_dim <= 2:
        raise ConfigError(f"head_dim: rope_type 'dynamic' needs at least 4, got {head_dim}")
    inv_freq, scaling = _default(config, head_dim, max_position_embeddings, positions)
    assert config.factor is not None
    length = jnp.maximum(jnp.max(positions) + 1, max_position_embeddings).astype(jnp.float32)
    growth = config.factor * length / max_position_embeddings - (config.factor - 1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / (head_dim - 2)
    return inv_freq * jnp.exp(-exponents * jnp.log(growth)), scaling


def _llama3(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[np.ndarray, float]:
    """Llama 3.1: divides low frequencies by `factor`, keeps high ones, interpolates in between."""
    inv_freq, scaling = _default(config, head_dim, max_position_embeddings, positions)
    length, factor = config.original_max_position_embeddings, config.factor
    low, high = config.low_freq_factor, config.high_freq_factor
    assert length is not None
    assert factor is not None
    assert low is not None
    assert high is not None
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(length) / wavelength - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * inv_freq / np.float32(factor) + smooth * inv_freq
    slowed = inv_freq / np.float32(factor)
    is_long, is_short = wavelength > length / low, wavelength < length / high
    return np.where(is_long, slowed, np.where(is_short, inv_freq, between)), scaling


def _yarn(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[np.ndarray, float]:
    """YaRN, arXiv:2309.00071: interpolation by parts (eq. 20 to 23) and a temperature (eq. 25)."""
    del positions
    factor = config.factor
    assert factor is not None
    length = config.original_max_position_embeddings or max_position_embeddings

    def channel_with(rotations: float) -> float:
        """Real-valued index of the channel with `rotations` rotations over `length` positions."""
        turns = math.log(length / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(config.rope_theta))

    first = channel_with(config.beta_fast or YARN_BETA_FAST)
    last = channel_with(config.beta_slow or YARN_BETA_SLOW)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # as transformers does, against a division by zero
    channels = np.arange(head_dim // 2, dtype=np.float32)
    ramp = (channels - np.float32(first)) / np.float32(last - first)
    kept = np.float32(1.0) - np.clip(ramp, 0, 1)
    scales = _wavelength_scales(config, head_dim)
    interpolated = np.float32(1.0) / (np.float32(factor) * scales)
    inv_freq = interpolated * (1 - kept) + (np.float32(1.0) / scales) * kept
    return inv_freq, _yarn_attention_scaling(config, factor)


def _yarn_attention_scaling(config: RopeConfig, factor: float) -> float:
    """Factor of cos and sin; its square is the inverse temperature of attention."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _longrope(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[jax.Array, float]:
    """LongRoPE, arXiv:2402.13753: a factor for each wavelength.

    As in transformers, the long factors apply if the longest sequence of the batch exceeds
    `original_max_position_embeddings`, and the short ones otherwise.
    """
    length, factor = config.original_max_position_embeddings, config.factor
    assert length is not None
    scales = _wavelength_scales(config, head_dim)
    short, long = (
        np.float32(1.0) / (np.asarray(factors, np.float32) * scales)
        for factors in (config.short_factor, config.long_factor)
    )
    inv_freq = jnp.where(jnp.max(positions) + 1 > length, long, short)
    if config.attention_factor is not None:
        return inv_freq, config.attention_factor
    factor = max_position_embeddings / length if factor is None else factor
    if factor <= 1:
        return inv_freq, 1.0
    return inv_freq, math.sqrt(1 + math.log(factor) / math.log(length))


def _proportional(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[np.ndarray, float]:
    """Gemma 4: the default rule for a share of the pairs of channels; the others do not turn."""
    inv_freq, scaling = _default(config, head_dim, max_position_embeddings, positions)
    turning = int(config.partial_rotary_factor * head_dim // 2)
    kept = np.where(np.arange(head_dim // 2) < turning, inv_freq, np.float32(0.0))
    return kept / np.float32(config.factor or 1.0), scaling


ROPE_TYPES: dict[str, FrequencyRule] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


def rope_frequencies(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[np.ndarray | jax.Array, float]:
    """Radians per position of each pair of channels.

    Args:
      config: the rule and its parameters.
      head_dim: number of channels of a head; N of them, an even number, are rotated.
      max_position_embeddings: maximum length of the model, from its config.
      positions: integers of any shape. Only `dynamic` and `longrope` read them, including those of
        padding, which must not exceed those of real tokens.

    Returns:
      `inv_freq` `[N / 2]` float32 (a constant, except for `dynamic` and `longrope`), and the factor
      of cos and sin (1 except for `yarn` and `longrope`).

    Raises:
      ConfigError: `dynamic` is not defined for this `head_dim`.
    """
    rotated = config.rotary_dim(head_dim)
    return ROPE_TYPES[config.rope_type](config, rotated, max_position_embeddings, positions)


def rotary_tables(
    config: RopeConfig, head_dim: int, max_position_embeddings: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angle of each rotated channel, each float32 `[B, S, N]`.

    The two channels of a pair have the same angle. Arguments as for `rope_frequencies`, with
    `positions` `[B, S]`. Angles are float32 in every compute dtype.
    """
    inv_freq, attention_scaling = rope_frequencies(
        config, head_dim, max_position_embeddings, positions
    )
    angles = positions[..., None].astype(jnp.float32) * inv_freq[None, None]
    if config.interleaved:
        angles = jnp.repeat(angles, 2, axis=-1)
    else:
        angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * attention_scaling, jnp.sin(angles) * attention_scaling


def query_scales(config: RopeConfig, positions: jax.Array) -> jax.Array | None:
    """Factor of the query at each position, float32 `[B, S]`; None if there is none.

    It is Llama 4's temperature of attention, which grows with the position; see
    `RopeConfig.llama_4_scaling_beta`.

    Args:
      config: rotary embedding of the model.
      positions: int `[B, S]`.
    """
    beta, length = config.llama_4_scaling_beta, config.original_max_position_embeddings
    if beta is None:
        return None
    assert length is not None
    return 1.0 + beta * jnp.log1p((positions // length).astype(jnp.float32))


def apply_rope(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False
) -> jax.Array:
    """Rotates queries or keys.

    Args:
      x: `[B, S, H, head_dim]`.
      cos: `[B, S, N]`, from `rotary_tables`.
      sin: `[B, S, N]`, from `rotary_tables`.
      interleaved: pairs adjacent channels, see `RopeConfig`.

    Returns:
      `x` with its first N channels rotated, in the same shape and dtype; computed in float32.
    """
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        kept = x[..., rotated:]
        turned = apply_rope(x[..., :rotated], cos, sin, interleaved=interleaved)
        return jnp.concatenate([turned, kept], axis=-1)
    if interleaved:
        turned = jnp.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).reshape(x.shape)
    else:
        first, second = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    result = x.astype(cos.dtype) * cos + turned.astype(sin.dtype) * sin
    return result.astype(x.dtype)
