"""One decoder layer: frozen attention and FFN, with the adapters that attach to them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterContext, FFNUpdate, FrozenFFN, FrozenProjection
from moe_jax.adapters.projection import AdaptedLinear
from moe_jax.adapters.rows import AdapterRows, replace_rows, take_rows
from moe_jax.adapters.tree import MLP_MODULES, MOE
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.layers.activation import ACTIVATIONS, gated
from moe_jax.layers.attention import cached_attention, causal_attention
from moe_jax.layers.frozen import Storage
from moe_jax.layers.kv_cache import CachePosition, extend_cache, fill_cache
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.rope import apply_rope
from moe_jax.sharding.axes import (
    EMBED,
    HEADS,
    HIDDEN_AXES,
    KV_HEADS,
    MLP,
    MLP_HIDDEN_AXES,
    constrain,
)


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
    """

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array | None
    token_mask: jax.Array
    expert_groups: jax.Array | None
    cache_position: CachePosition | None = None


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
        config = self.settings.config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        qkv_bias = config.attention_bias or config.qkv_bias

        def project(
            name: str, x: jax.Array, features: int, axes: tuple[str, str], use_bias: bool
        ) -> jax.Array:
            layer = _linear(self.settings, name, (x.shape[-1], features), axes, use_bias)
            deterministic = self.settings.deterministic
            return layer(x, contexts, deterministic=deterministic)

        def split(y: jax.Array, n: int) -> jax.Array:
            return y.reshape(*y.shape[:-1], n, width)

        query = split(project("q_proj", x, heads * width, (EMBED, HEADS), qkv_bias), heads)
        key = split(project("k_proj", x, kv_heads * width, (EMBED, KV_HEADS), qkv_bias), kv_heads)
        value = split(project("v_proj", x, kv_heads * width, (EMBED, KV_HEADS), qkv_bias), kv_heads)
        if config.qk_norm:
            query = _norm(self.settings, "q_norm")(query)
            key = _norm(self.settings, "k_norm")(key)
        cos, sin = _rotary_tables(config, context, layer_index)
        query = apply_rope(query, cos, sin, interleaved=config.rope.interleaved)
        key = apply_rope(key, cos, sin, interleaved=config.rope.interleaved)
        attended = self._attend(query, key, value, context, layer_index)
        attended = attended.reshape(*x.shape[:-1], heads * width)
        axes = (HEADS, EMBED)
        return project("o_proj", attended, config.hidden_size, axes, config.attention_bias)

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        context: TokenContext,
        layer_index: jax.Array,
    ) -> jax.Array:
        config, cache_length = self.settings.config, self.settings.cache_length
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        options = {
            "scale": scale,
            "window": config.sliding_window,
            "slides": _is_sliding(config, layer_index),
            "softcap": config.attn_logit_softcapping,
        }
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


class FFNAdapters(nn.Module):
    """Applies each adapter that replaces the FFN to its rows; their path in the trees is `moe`."""

    settings: LayerSettings

    @nn.compact
    def __call__(
        self, x: jax.Array, ffn: FrozenFFN, contexts: Mapping[str, AdapterContext]
    ) -> dict[str, FFNUpdate]:
        """The update of each such adapter, for its own rows.

        Args:
          x: input of the FFN, [B, S, D].
          ffn: the frozen FFN on all rows.
          contexts: context of each adapter.
        """
        updates = {}
        for rows in self.settings.adapter_rows:
            adapter = rows.method.mlp_adapter()
            if adapter is None:
                continue
            if any(rows.method.projection_adapter(t, (EMBED, MLP)) for t in MLP_MODULES):
                raise ValueError(
                    f"adapter {rows.name!r}: its method adapts the FFN both as a whole and "
                    "projection by projection; only one of the two has an effect"
                )
            frozen = ffn._replace(
                gate=ffn.gate._replace(product=take_rows(rows, ffn.gate.product)),
                up=ffn.up._replace(product=take_rows(rows, ffn.up.product)),
            )
            module = adapter.clone(parent=self, name=rows.module_name)
            deterministic = self.settings.deterministic
            updates[rows.name] = module(
                take_rows(rows, x), frozen, contexts[rows.name], deterministic=deterministic
            )
        return updates


class GatedMLP(nn.Module):
    """The gated FFN (arXiv:2002.05202, section 2): `(act(x W_gate) * x W_up) W_down`.

    Each frozen projection runs once on all rows. An adapter that replaces the FFN, like MixLoRA,
    changes the hidden activation of its rows before the down projection and adds to the product
    after it.
    """

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, contexts: Mapping[str, AdapterContext]) -> jax.Array:
        settings, config = self.settings, self.settings.config
        wide, narrow = config.intermediate_size, config.hidden_size
        gate = _linear(settings, "gate_proj", (narrow, wide), (EMBED, MLP), config.mlp_bias)
        up = _linear(settings, "up_proj", (narrow, wide), (EMBED, MLP), config.mlp_bias)
        down = _linear(settings, "down_proj", (wide, narrow), (MLP, EMBED), config.mlp_bias)
        activation = ACTIVATIONS[config.hidden_act]
        options: Any = {"deterministic": settings.deterministic}

        ffn = FrozenFFN(
            FrozenProjection(gate.product(x), gate.kernel),
            FrozenProjection(up.product(x), up.kernel),
            gate.bias,
            up.bias,
            down.kernel,
            down.bias,
            activation,
        )
        hidden = gated(
            activation,
            gate(x, contexts, product=ffn.gate.product, **options),
            up(x, contexts, product=ffn.up.product, **options),
        )
        experts = FFNAdapters(settings, name=MOE)(x, ffn, contexts)
        # Rows without `hidden` pass through W_down too; their product is discarded below.
        replaced = {name: new.hidden for name, new in experts.items() if new.hidden is not None}
        hidden = replace_rows(settings.adapter_rows, hidden, replaced)
        product = down.product(constrain(hidden, MLP_HIDDEN_AXES))
        outputs = dict[str, jax.Array]()
        for rows in settings.adapter_rows:
            update = experts.get(rows.name)
            if update is not None and update.hidden is not None:
                outputs[rows.name] = take_rows(rows, product) + update.output
            elif update is not None:
                outputs[rows.name] = update.output
        product = replace_rows(settings.adapter_rows, product, outputs)
        return down(hidden, contexts, product=product, **options)


class DecoderLayer(nn.Module):
    """Pre-norm residual layer with the signature of `nn.scan`: carry in, carry and None out.

    `post_attention_layernorm` precedes the FFN, as in Llama. Families with norms after attention
    and FFN have `post_self_attn_layernorm` and `post_mlp_layernorm`.
    """

    settings: LayerSettings

    @nn.compact
    def __call__(
        self, x: jax.Array, context: TokenContext, layer_index: jax.Array
    ) -> tuple[jax.Array, None]:
        contexts = {
            rows.name: _adapter_context(self.settings, rows, context, layer_index)
            for rows in self.settings.adapter_rows
        }
        x = constrain(x, HIDDEN_AXES)
        post_norms = self.settings.config.post_norms
        normed = _norm(self.settings, "input_layernorm")(x)
        update = SelfAttention(self.settings, name="self_attn")(
            normed, context, layer_index, contexts
        )
        x = x + (_norm(self.settings, "post_self_attn_layernorm")(update) if post_norms else update)
        normed = _norm(self.settings, "post_attention_layernorm")(x)
        update = GatedMLP(self.settings, name="mlp")(normed, contexts)
        x = x + (_norm(self.settings, "post_mlp_layernorm")(update) if post_norms else update)
        return constrain(x, HIDDEN_AXES), None


def _adapter_context(
    settings: LayerSettings, rows: AdapterRows, context: TokenContext, layer_index: jax.Array
) -> AdapterContext:
    expert_groups = segment_ids = None
    if context.expert_groups is not None and rows.method.needs_expert_groups:
        expert_groups = take_rows(rows, context.expert_groups)
    if context.segment_ids is not None:
        segment_ids = take_rows(rows, context.segment_ids)
    return AdapterContext(
        take_rows(rows, context.token_mask),
        layer_index,
        settings.config.num_layers,
        expert_groups,
        segment_ids,
    )


def _rotary_tables(
    config: ModelConfig, context: TokenContext, layer_index: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines [B, S, N] of this layer."""
    if config.sliding_rope is None:
        return context.cos, context.sin
    table = jnp.asarray(config.sliding_layers, jnp.int32)[layer_index]
    return context.cos[table], context.sin[table]


def _is_sliding(config: ModelConfig, layer_index: jax.Array) -> jax.Array | None:
    """True if this layer has a sliding window, bool []; None if all layers are alike."""
    slides = config.sliding_layers
    return None if len(set(slides)) == 1 else jnp.asarray(slides)[layer_index]


def _norm(settings: LayerSettings, name: str) -> RMSNorm:
    config = settings.config
    return RMSNorm(
        config.rms_norm_eps,
        settings.dtype,
        settings.storage.dtype,
        config.norm_unit_offset,
        name=name,
    )


def _linear(
    settings: LayerSettings,
    name: str,
    widths: tuple[int, int],
    axes: tuple[str, str],
    use_bias: bool,
) -> AdaptedLinear:
    return AdaptedLinear(
        *widths,
        axes,
        use_bias,
        settings.dtype,
        settings.storage,
        adapter_rows=settings.adapter_rows,
        name=name,
    )
