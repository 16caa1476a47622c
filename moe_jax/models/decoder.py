"""One decoder layer: attention and FFN, frozen, with the adapters that attach to them."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.projection import AdaptedLinear
from moe_jax.adapters.segments import Segment, update_rows
from moe_jax.adapters.sites import MOE, module_name
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.layers.activation import ACTIVATIONS
from moe_jax.layers.attention import attention_mask, causal_attention
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
    """What every layer needs to know of the tokens besides their hidden states.

    Attributes:
      cos, sin: rotary tables, float32 [B, S, Q].
      segment_ids: int32 [B, S] as in `Batch`, or None where rows are single sequences without
        padding on the left, for which causality is mask enough.
      token_mask: bool [B, S], false at padding.
    """

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array | None
    token_mask: jax.Array


class LayerSettings(NamedTuple):
    """What every layer is built from; static."""

    config: ModelConfig
    compute: ComputeConfig
    param_dtype: jnp.dtype
    segments: tuple[Segment, ...]
    deterministic: bool

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute.dtype)


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, context: TokenContext) -> jax.Array:
        config = self.settings.config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim

        def project(name: str, x: jax.Array, features: int, axes: tuple[str, str]) -> jax.Array:
            layer = _linear(self.settings, name, features, axes, config.attention_bias)
            return layer(x, deterministic=self.settings.deterministic)

        def split(y: jax.Array, n: int) -> jax.Array:
            return y.reshape(*y.shape[:-1], n, width)

        query = split(project("q_proj", x, heads * width, (EMBED, HEADS)), heads)
        key = split(project("k_proj", x, kv_heads * width, (EMBED, KV_HEADS)), kv_heads)
        value = split(project("v_proj", x, kv_heads * width, (EMBED, KV_HEADS)), kv_heads)
        query = apply_rope(query, context.cos, context.sin)
        key = apply_rope(key, context.cos, context.sin)
        mask = None if context.segment_ids is None else attention_mask(context.segment_ids)
        attended = causal_attention(
            query, key, value, mask=mask, implementation=self.settings.compute.attention
        )
        attended = attended.reshape(*x.shape[:-1], heads * width)
        return project("o_proj", attended, config.hidden_size, (HEADS, EMBED))


class MoeSite(nn.Module):
    """Where adapters take the FFN as a whole; gives it a place of its own in the adapters' tree."""

    settings: LayerSettings

    @nn.compact
    def __call__(
        self, x: jax.Array, gate: jax.Array, up: jax.Array, hidden: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """The hidden activation [B, S, F], and what is added after the down projection, or None."""
        activation = ACTIVATIONS[self.settings.config.hidden_act]
        added: jax.Array | None = None
        for segment in self.settings.segments:
            adapter = segment.method.mlp_adapter()
            if adapter is None:
                continue
            adapter = adapter.clone(parent=self, name=module_name(segment.name))
            rows = slice(segment.start, segment.stop)
            own_hidden, own_added = adapter(
                x[rows],
                gate[rows],
                up[rows],
                activation,
                mask[rows],
                deterministic=self.settings.deterministic,
            )
            hidden = update_rows(segment, hidden, lambda _, new=own_hidden: new)
            if own_added is not None:
                added = jnp.zeros_like(x) if added is None else added
                added = update_rows(segment, added, lambda _, new=own_added: new)
        return hidden, added


class GatedMLP(nn.Module):
    """The gated FFN (arXiv:2002.05202, section 2): `(act(x W_gate) * x W_up) W_down`."""

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, context: TokenContext) -> jax.Array:
        config = self.settings.config

        def project(name: str, x: jax.Array, features: int, axes: tuple[str, str]) -> jax.Array:
            layer = _linear(self.settings, name, features, axes, config.mlp_bias)
            return layer(x, deterministic=self.settings.deterministic)

        gate = project("gate_proj", x, config.intermediate_size, (EMBED, MLP))
        up = project("up_proj", x, config.intermediate_size, (EMBED, MLP))
        hidden = ACTIVATIONS[config.hidden_act](gate) * up
        site = MoeSite(self.settings, name=MOE)
        hidden, added = site(x, gate, up, hidden, context.token_mask)
        hidden = constrain(hidden, MLP_HIDDEN_AXES)
        y = project("down_proj", hidden, config.hidden_size, (MLP, EMBED))
        return y if added is None else y + added


class DecoderLayer(nn.Module):
    """Pre-norm residual layer; the shape that `nn.scan` wants: carry in, carry and None out."""

    settings: LayerSettings

    @nn.compact
    def __call__(self, x: jax.Array, context: TokenContext) -> tuple[jax.Array, None]:
        x = constrain(x, HIDDEN_AXES)
        normed = _norm(self.settings, "input_layernorm")(x)
        x = x + SelfAttention(self.settings, name="self_attn")(normed, context)
        normed = _norm(self.settings, "post_attention_layernorm")(x)
        x = x + GatedMLP(self.settings, name="mlp")(normed, context)
        return constrain(x, HIDDEN_AXES), None


def _norm(settings: LayerSettings, name: str) -> RMSNorm:
    return RMSNorm(settings.config.rms_norm_eps, settings.dtype, settings.param_dtype, name=name)


def _linear(
    settings: LayerSettings, name: str, features: int, axes: tuple[str, str], use_bias: bool
) -> AdaptedLinear:
    return AdaptedLinear(
        features,
        axes,
        use_bias,
        settings.dtype,
        settings.param_dtype,
        segments=settings.segments,
        name=name,
    )
