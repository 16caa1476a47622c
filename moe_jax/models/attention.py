"""Softmax attention of a decoder layer, with the adapters of its frozen projections."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.method import AdapterContext
from moe_jax.config.attention import GLOBAL_ATTENTION, SELF_ATTENTION
from moe_jax.config.model import ModelConfig
from moe_jax.layers.attention import cached_attention, causal_attention
from moe_jax.layers.block_cache import BlockPosition, add_to_blocks, block_attention
from moe_jax.layers.kv_cache import KeysAndValues, extend_cache, fill_cache
from moe_jax.layers.names import NARROW_PRODUCT
from moe_jax.layers.norm import unit_rms
from moe_jax.layers.rope import apply_rope
from moe_jax.models.layer_inputs import LayerSettings, TokenContext, linear, norm, with_dropout_keys
from moe_jax.sharding.axes import EMBED, HEADS, KV_HEADS


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions.

    Attributes:
      settings: settings of all layers.
      reads: module of the earlier layer whose keys and values this layer attends to; None if it has
        its own.
    """

    settings: LayerSettings
    reads: ClassVar[str | None] = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: TokenContext,
        layer_index: jax.Array,
        contexts: Mapping[str, AdapterContext],
    ) -> tuple[jax.Array, KeysAndValues | None]:
        """The output [B, S, D], and the keys and values if later layers attend to them."""
        config = self.config
        contexts = with_dropout_keys(self, contexts)
        tables = self._rotary_tables(context, layer_index)
        query, gate = self._query(x, contexts)
        query = self._rotated(query, "q_norm", config.num_heads, tables)
        if context.query_scales is not None:
            query = query * context.query_scales[..., None, None].astype(query.dtype)
        if not config.qk_norm:  # kept instead of the product, which then has no further use
            query = checkpoint_name(query, NARROW_PRODUCT)
        if self.reads is None:
            kept = self._keys_and_values(x, context, tables, contexts)
        else:
            assert context.kept is not None
            kept = context.kept[self.reads]
        attended = self._attend(query, kept, context, layer_index)
        if gate is not None:
            attended = attended * jax.nn.sigmoid(gate)
        attended = attended.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        contexts = with_dropout_keys(self, contexts)
        axes, use_bias = (HEADS, EMBED), config.attention_bias
        output = self._project("o_proj", attended, config.hidden_size, axes, use_bias, contexts)
        keeps = self.settings.config.has_readers and self.reads is None
        return output, kept if keeps else None

    def _project(
        self,
        name: str,
        x: jax.Array,
        features: int,
        axes: tuple[str, str],
        use_bias: bool,
        contexts: Mapping[str, AdapterContext],
    ) -> jax.Array:
        layer = linear(self.settings, name, (x.shape[-1], features), axes, use_bias)
        return layer(x, contexts, deterministic=self.settings.deterministic)

    def _query(
        self, x: jax.Array, contexts: Mapping[str, AdapterContext]
    ) -> tuple[jax.Array, jax.Array | None]:
        """Queries [B, S, H Q] before their norm, and the output's gate [B, S, H, Q], if any."""
        config = self.config
        heads, width = config.num_heads, config.head_dim
        per_head = 2 * width if config.attention_gate else width
        use_bias = config.attention_bias or config.qkv_bias
        query = self._project("q_proj", x, heads * per_head, (EMBED, HEADS), use_bias, contexts)
        if not config.attention_gate:
            return query, None
        query, gate = jnp.split(query.reshape(*x.shape[:-1], heads, per_head), 2, axis=-1)
        return query.reshape(*x.shape[:-1], heads * width), gate

    def _keys_and_values(
        self,
        x: jax.Array,
        context: TokenContext,
        tables: tuple[jax.Array, jax.Array],
        contexts: Mapping[str, AdapterContext],
    ) -> KeysAndValues:
        """Keys and values, which are added to the cache if there is one."""
        config = self.config
        heads, axes = config.num_kv_heads, (EMBED, KV_HEADS)
        features, use_bias = heads * config.head_dim, config.attention_bias or config.qkv_bias
        key = self._project("k_proj", x, features, axes, use_bias, contexts)
        value = key
        if not config.key_as_value:
            value = self._project("v_proj", x, features, axes, use_bias, contexts)
        value = value.reshape(*x.shape[:-1], heads, config.head_dim)
        if config.value_norm:
            value = unit_rms(value, config.rms_norm_eps).astype(value.dtype)
        key = self._rotated(key, "k_norm", heads, tables)
        if not config.qk_norm:
            key = checkpoint_name(key, NARROW_PRODUCT)
        cached = None
        if isinstance(context.cache_position, BlockPosition):
            add_to_blocks(self, key, value)
        elif context.cache_position is not None:
            cached = extend_cache(self, key, value)
        elif self.settings.cache_length is not None:
            fill_cache(self, key, value, self.settings.cache_length)
        return KeysAndValues(key, value, cached)

    def _rotated(
        self, x: jax.Array, name: str, heads: int, tables: tuple[jax.Array, jax.Array]
    ) -> jax.Array:
        """Queries or keys [B, S, heads Q] as [B, S, heads, Q], normalized and rotated.

        Args:
          x: products of the projection.
          name: name of the norm, if the architecture has it.
          heads: number of heads.
          tables: cosines and sines.
        """
        config = self.config
        normalized = config.qk_norm_of if config.qk_norm else None
        if normalized == "projection":
            x = norm(self.settings, name)(x)
        x = x.reshape(*x.shape[:-1], heads, config.head_dim)
        if normalized == "head":
            x = norm(self.settings, name)(x)
        x = apply_rope(x, *tables, interleaved=config.rope.interleaved)
        return norm(self.settings, name)(x) if normalized == "rotated_head" else x

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
        self, query: jax.Array, kept: KeysAndValues, context: TokenContext, layer_index: jax.Array
    ) -> jax.Array:
        config, position = self.config, context.cache_position
        options = {
            "scale": (config.query_pre_attn_scalar or config.head_dim) ** -0.5,
            "window": config.sliding_window,
            "slides": _is_sliding(config, layer_index),
            "softcap": config.attn_logit_softcapping,
        }
        tokens = (query, kept.key, kept.value)
        if isinstance(position, BlockPosition):
            return block_attention(*tokens, context.token_mask, position, layer_index, **options)
        if position is not None:
            assert kept.cached is not None
            return cached_attention(*tokens, *kept.cached, position, **options)
        return causal_attention(
            *tokens,
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


class SelfAttentionReader(SelfAttention):
    """Sliding attention to the keys and values of an earlier layer."""

    reads: ClassVar[str | None] = SELF_ATTENTION


class GlobalAttentionReader(GlobalAttention):
    """Full attention to the keys and values of an earlier layer."""

    reads: ClassVar[str | None] = GLOBAL_ATTENTION


def _is_sliding(config: ModelConfig, layer_index: jax.Array) -> jax.Array | None:
    """True if this layer has a sliding window, bool []; None if all layers are alike."""
    slides = config.sliding_layers
    return None if len(set(slides)) == 1 else jnp.asarray(slides)[layer_index]
