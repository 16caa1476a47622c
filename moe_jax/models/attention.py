"""Softmax attention of a decoder layer, with the adapters of its frozen projections."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.method import AdapterContext
from moe_jax.config.model import ModelConfig
from moe_jax.layers.attention import cached_attention, causal_attention
from moe_jax.layers.block_cache import BlockPosition, add_to_blocks, block_attention
from moe_jax.layers.kv_cache import extend_cache, fill_cache
from moe_jax.layers.names import NARROW_PRODUCT
from moe_jax.layers.norm import unit_rms
from moe_jax.layers.rope import apply_rope
from moe_jax.models.layer_inputs import LayerSettings, TokenContext, linear, norm, with_dropout_keys
from moe_jax.sharding.axes import EMBED, HEADS, KV_HEADS


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    settings: LayerSettings

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: TokenContext,
        layer_index: jax.Array,
        contexts: Mapping[str, AdapterContext],
    ) -> jax.Array:
        config = self.config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        qkv_bias = config.attention_bias or config.qkv_bias
        contexts = with_dropout_keys(self, contexts)

        def project(
            name: str, x: jax.Array, features: int, axes: tuple[str, str], use_bias: bool
        ) -> jax.Array:
            layer = linear(self.settings, name, (x.shape[-1], features), axes, use_bias)
            deterministic = self.settings.deterministic
            return layer(x, contexts, deterministic=deterministic)

        def split(y: jax.Array, n: int) -> jax.Array:
            return y.reshape(*y.shape[:-1], n, width)

        per_head = 2 * width if config.attention_gate else width
        query = project("q_proj", x, heads * per_head, (EMBED, HEADS), qkv_bias)
        gate = None
        if config.attention_gate:
            query, gate = jnp.split(query.reshape(*x.shape[:-1], heads, per_head), 2, axis=-1)
            query = query.reshape(*x.shape[:-1], heads * width)
        key = project("k_proj", x, kv_heads * width, (EMBED, KV_HEADS), qkv_bias)
        value = key
        if not config.key_as_value:
            value = project("v_proj", x, kv_heads * width, (EMBED, KV_HEADS), qkv_bias)
        normalized = config.qk_norm_of if config.qk_norm else None
        if normalized == "projection":
            query, key = self._normed(query, key)
        query, key, value = split(query, heads), split(key, kv_heads), split(value, kv_heads)
        if config.value_norm:
            value = unit_rms(value, config.rms_norm_eps).astype(value.dtype)
        if normalized == "head":
            query, key = self._normed(query, key)
        cos, sin = self._rotary_tables(context, layer_index)
        query = apply_rope(query, cos, sin, interleaved=config.rope.interleaved)
        key = apply_rope(key, cos, sin, interleaved=config.rope.interleaved)
        if normalized == "rotated_head":
            query, key = self._normed(query, key)
        if context.query_scales is not None:
            query = query * context.query_scales[..., None, None].astype(query.dtype)
        if not config.qk_norm:  # kept instead of the products, which then have no further use
            query, key = checkpoint_name((query, key), NARROW_PRODUCT)
        attended = self._attend(query, key, value, context, layer_index)
        if gate is not None:
            attended = attended * jax.nn.sigmoid(gate)
        attended = attended.reshape(*x.shape[:-1], heads * width)
        contexts = with_dropout_keys(self, contexts)
        axes = (HEADS, EMBED)
        return project("o_proj", attended, config.hidden_size, axes, config.attention_bias)

    def _normed(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return norm(self.settings, "q_norm")(query), norm(self.settings, "k_norm")(key)

    @property
    def config(self) -> ModelConfig:
        """The architecture as this layer sees it."""
        return self.settings.config.local_layers

    def _rotary_tables(
        self, context: TokenContext, layer_index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The cosines and sines [B, S, N] of this layer."""
        config, cos, sin = self.config, context.cos, context.sin
        if config.sliding_rope is not None:
            table = jnp.asarray(config.sliding_layers, jnp.int32)[layer_index]
            cos, sin = cos[table], sin[table]
        if config.rotated_layers is not None:
            rotates = jnp.asarray(config.rotated_layers)[layer_index]
            cos, sin = jnp.where(rotates, cos, 1.0), jnp.where(rotates, sin, 0.0)
        return cos, sin

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        context: TokenContext,
        layer_index: jax.Array,
    ) -> jax.Array:
        config, cache_length = self.config, self.settings.cache_length
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        options = {
            "scale": scale,
            "window": config.sliding_window,
            "slides": _is_sliding(config, layer_index),
            "softcap": config.attn_logit_softcapping,
        }
        if isinstance(context.cache_position, BlockPosition):
            add_to_blocks(self, key, value)
            tokens = (query, key, value, context.token_mask)
            return block_attention(*tokens, context.cache_position, layer_index, **options)
        if context.cache_position is not None:
            before = extend_cache(self, key, value)
            return cached_attention(query, key, value, *before, context.cache_position, **options)
        if cache_length is not None:
            fill_cache(self, key, value, cache_length)
        return causal_attention(
            query,
            key,
            value,
            segment_ids=context.segment_ids,
            implementation=self.settings.compute.attention,
            **options,
        )


class GlobalAttention(SelfAttention):
    """Full attention of layers whose sizes differ from those of sliding layers."""

    @property
    def config(self) -> ModelConfig:
        return self.settings.config.global_layers

    def _rotary_tables(
        self, context: TokenContext, layer_index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        assert context.global_tables is not None
        return context.global_tables


def _is_sliding(config: ModelConfig, layer_index: jax.Array) -> jax.Array | None:
    """True if this layer has a sliding window, bool []; None if all layers are alike."""
    slides = config.sliding_layers
    return None if len(set(slides)) == 1 else jnp.asarray(slides)[layer_index]
