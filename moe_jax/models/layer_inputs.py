"""Settings, inputs and parts that the modules of a decoder layer share."""

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterContext
from moe_jax.adapters.projection import AdaptedLinear
from moe_jax.adapters.rows import AdapterRows, Windows
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.layers.block_cache import BlockPosition
from moe_jax.layers.frozen import Storage
from moe_jax.layers.kv_cache import CachePosition, KeysAndValues
from moe_jax.layers.norm import RMSNorm


class TokenContext(NamedTuple):
    """Inputs of every layer besides the hidden states.

    Attributes:
      cos, sin: rotary tables, float32 [B, S, N] for N rotated channels of a head; [2, B, S, N] if
        sliding layers have other tables, which come second.
      segment_ids: int32 [B, S] as in `Batch`; None if rows are single sequences without padding on
        the left, for which the causal mask suffices.
      token_mask: bool [B, S], false at padding.
      expert_groups: int32 [B, S] as in `Batch`, or None.
      cache_position: position of these tokens after those in a cache, or None.
      query_scales: float32 [B, S], see `moe_jax.layers.rope.query_scales`, or None.
      windows: windows of all adapters, where their rows change from call to call, or None.
      global_tables: rotary tables of layers with `global_attn`, or None.
      layer_embeddings: embedding of each layer [L, B, S, P], or None.
      kept: keys and values of earlier layers by the name of their module, for layers without their
        own, or None.
    """

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array | None
    token_mask: jax.Array
    expert_groups: jax.Array | None
    cache_position: CachePosition | BlockPosition | None = None
    query_scales: jax.Array | None = None
    windows: Windows | None = None
    global_tables: tuple[jax.Array, jax.Array] | None = None
    layer_embeddings: jax.Array | None = None
    kept: Mapping[str, KeysAndValues] | None = None


class LayerSettings(NamedTuple):
    """Static settings that every layer is built from.

    `cache_length` is None unless the call fills a cache; see `moe_jax.layers.kv_cache`.
    """

    config: ModelConfig
    compute: ComputeConfig
    storage: Storage
    adapter_rows: tuple[AdapterRows, ...]
    deterministic: bool
    cache_length: int | None = None

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)


def with_dropout_keys(
    module: nn.Module, contexts: Mapping[str, AdapterContext]
) -> dict[str, AdapterContext]:
    """Contexts with new keys, for the adapters of all projections of one input.

    The key of an adapter does not depend on the others.
    """
    if not module.has_rng("dropout"):
        return dict(contexts)
    key = module.make_rng("dropout")
    return {
        name: context._replace(dropout_key=jax.random.fold_in(key, zlib.crc32(name.encode())))
        for name, context in contexts.items()
    }


def norm(settings: LayerSettings, name: str) -> RMSNorm:
    """The norm `name` of a layer, as the architecture has them."""
    config = settings.config
    return RMSNorm(
        config.rms_norm_eps,
        settings.dtype,
        settings.storage.dtype,
        config.norm_unit_offset,
        config.norm_centered,
        name=name,
    )


def linear(
    settings: LayerSettings,
    name: str,
    widths: tuple[int, int],
    axes: tuple[str, str],
    use_bias: bool,
) -> AdaptedLinear:
    """The frozen projection `name` of a layer with its adapters.

    Args:
      settings: settings of the layer.
      name: name of the projection, by which adapters target it.
      widths: its inputs and outputs.
      axes: logical axes of its kernel, (in, out).
      use_bias: True if there is a bias.
    """
    return AdaptedLinear(
        *widths,
        axes,
        use_bias,
        settings.dtype,
        settings.storage,
        adapter_rows=settings.adapter_rows,
        name=name,
    )
