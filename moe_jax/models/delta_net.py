"""Linear attention by the gated delta rule: the Gated DeltaNet block (arXiv:2412.06464, figure 1).

The layout of projections is that of Qwen3.5: one for queries, keys and values, one for the output's
gate, and two narrow ones for the rate and the decay of each head.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterContext
from moe_jax.config.attention import DeltaNetConfig
from moe_jax.layers.activation import ACTIVATIONS
from moe_jax.layers.delta_rule import DeltaInputs, gated_delta_rule
from moe_jax.layers.frozen import frozen_leaf
from moe_jax.layers.kv_cache import read_cache, write_cache
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.short_convolution import causal_convolution, last_inputs
from moe_jax.layers.tokens import sequence_begins
from moe_jax.models.layer_inputs import LayerSettings, TokenContext, linear, with_dropout_keys
from moe_jax.sharding.axes import BATCH, EMBED, HEADS, NORM, constrain

_UNIT_EPSILON = 1e-6
"""Term added to the squared length of queries and keys, a constant of all known models."""

STATE, CONVOLUTION = "state", "convolution"
"""Names in the cache: the state of each head, and the last inputs of the convolution."""


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet: a short convolution, the gated delta rule, and a gated norm.

    Sequences of a row have states of their own, which begin at zero. While decoding, the cache has
    `state` float32 [B, H, Dk, Dv] and `convolution` [B, W - 1, C], the same size at any length.
    """

    settings: LayerSettings

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: TokenContext,
        layer_index: jax.Array,
        contexts: Mapping[str, AdapterContext],
    ) -> tuple[jax.Array, None]:
        """The output [B, S, D]; linear attention has no keys that later layers attend to."""
        del layer_index
        settings = self.settings
        net = _sizes(settings)
        options: Any = {"deterministic": settings.deterministic}
        contexts = with_dropout_keys(self, contexts)

        def project(name: str, features: int) -> jax.Array:
            module = linear(settings, name, (x.shape[-1], features), (EMBED, HEADS), False)
            return module(x, contexts, **options)

        mixed = self._convolved(project("in_proj_qkv", net.mixed_dim), context)
        gate = project("in_proj_z", net.value_dim)
        rate = jax.nn.sigmoid(project("in_proj_b", net.num_value_heads).astype(jnp.float32))
        step = project("in_proj_a", net.num_value_heads).astype(jnp.float32)
        output = self._recurrence(mixed, step, rate, context)
        normed = RMSNorm(
            settings.config.rms_norm_eps, settings.dtype, settings.storage.dtype, name="norm"
        )(output.astype(settings.dtype))
        gate = jax.nn.silu(gate.reshape(normed.shape).astype(jnp.float32))
        gated = (normed.astype(jnp.float32) * gate).astype(settings.dtype)
        contexts = with_dropout_keys(self, contexts)
        widths, axes = (net.value_dim, settings.config.hidden_size), (HEADS, EMBED)
        result = linear(settings, "out_proj", widths, axes, False)
        return result(gated.reshape(*x.shape[:-1], net.value_dim), contexts, **options), None

    def _convolved(self, mixed: jax.Array, context: TokenContext) -> jax.Array:
        """Queries, keys and values after the convolution, [B, S, C] in the dtype of `mixed`."""
        net = _sizes(self.settings)
        shape, axes = (net.mixed_dim, 1, net.filter_width), (NORM, None, None)
        dtype = self.settings.storage.dtype
        init = nn.initializers.normal(stddev=net.filter_width**-0.5)
        filters = frozen_leaf(self, "filters", init, shape, axes, dtype)[:, 0]
        decodes = context.cache_position is not None
        before = read_cache(self, CONVOLUTION) if decodes else None
        segment_ids = None if decodes else context.segment_ids
        activation = ACTIVATIONS[self.settings.config.hidden_act]
        result = causal_convolution(mixed, filters, segment_ids=segment_ids, before=before)
        if decodes or self.settings.cache_length is not None:
            inputs = mixed if before is None else jnp.concatenate([before, mixed], axis=1)
            last = last_inputs(inputs, net.filter_width - 1, segment_ids)
            write_cache(self, CONVOLUTION, constrain(last, (BATCH, None, None)))
        return activation(result.astype(mixed.dtype))

    def _recurrence(
        self, mixed: jax.Array, step: jax.Array, rate: jax.Array, context: TokenContext
    ) -> jax.Array:
        """Output of the delta rule, float32 [B, S, H, Dv]."""
        net = _sizes(self.settings)
        heads, dtype = (net.num_value_heads,), self.settings.storage.dtype
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        log_rate = frozen_leaf(self, "A_log", zeros, heads, (NORM,), dtype).astype(jnp.float32)
        bias = frozen_leaf(self, "dt_bias", ones, heads, (NORM,), dtype).astype(jnp.float32)
        query, key, value = jnp.split(mixed, (net.key_dim, 2 * net.key_dim), axis=-1)
        by_key = (*mixed.shape[:-1], net.num_key_heads, net.key_head_dim)
        inputs = DeltaInputs(
            query=_unit(query.reshape(by_key)) * net.key_head_dim**-0.5,
            key=_unit(key.reshape(by_key)),
            value=value.reshape(*mixed.shape[:-1], net.num_value_heads, net.value_head_dim),
            log_decay=-jnp.exp(log_rate)[None, None] * jax.nn.softplus(step + bias[None, None]),
            rate=rate,
        )
        decodes = context.cache_position is not None
        begins = None
        if not decodes and context.segment_ids is not None:
            begins = sequence_begins(context.segment_ids)
        state = read_cache(self, STATE) if decodes else None
        output, last = gated_delta_rule(inputs, begins, state)
        if decodes or self.settings.cache_length is not None:
            write_cache(self, STATE, constrain(last, (BATCH, None, None, None)))
        return output


def _sizes(settings: LayerSettings) -> DeltaNetConfig:
    net = settings.config.delta_net
    assert net is not None
    return net


def _unit(x: jax.Array) -> jax.Array:
    """`x` of unit length along its last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _UNIT_EPSILON)
