"""One decoder layer and its frozen FFN, with the adapters that attach to them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from moe_jax.adapters.method import (
    AdapterContext,
    FFNUpdate,
    FrozenFFN,
    FrozenProjection,
    windows_of,
)
from moe_jax.adapters.rows import AdapterRows, replace_rows, take_rows, window_of
from moe_jax.adapters.tree import MLP_MODULES, MOE
from moe_jax.config.attention import FFN, LAYER_EMBEDDING, SELF_ATTENTION, WIDE_FFN
from moe_jax.layers.activation import ACTIVATIONS, gated, scaled
from moe_jax.layers.block_cache import BlockPosition
from moe_jax.layers.frozen import frozen_leaf
from moe_jax.layers.kv_cache import KeysAndValues
from moe_jax.models.attention import SelfAttention
from moe_jax.models.layer_embedding import LayerEmbedding
from moe_jax.models.layer_inputs import LayerSettings, TokenContext, linear, norm, with_dropout_keys
from moe_jax.sharding.axes import (
    EMBED,
    HIDDEN_AXES,
    MLP,
    MLP_HIDDEN_AXES,
    NORM,
    constrain,
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
            context = contexts[rows.name]
            gate, up = (
                part._replace(product=take_rows(rows, part.product, context.window))
                for part in (ffn.gate, ffn.up)
            )
            module = adapter.clone(parent=self, name=rows.module_name)
            updates[rows.name] = module(
                take_rows(rows, x, context.window),
                ffn._replace(gate=gate, up=up),
                context,
                deterministic=self.settings.deterministic,
            )
        return updates


class GatedMLP(nn.Module):
    """The gated FFN (arXiv:2002.05202, section 2): `(act(x W_gate) * x W_up) W_down`.

    Each frozen projection runs once on all rows. An adapter that replaces the FFN, like MixLoRA,
    changes the hidden activation of its rows before the down projection and adds to the product
    after it.

    Attributes:
      settings: settings of all layers.
      width: F.
    """

    settings: LayerSettings
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, contexts: Mapping[str, AdapterContext]) -> jax.Array:
        settings, config = self.settings, self.settings.config
        wide, narrow = self.width, config.hidden_size
        gate = linear(settings, "gate_proj", (narrow, wide), (EMBED, MLP), config.mlp_bias)
        up = linear(settings, "up_proj", (narrow, wide), (EMBED, MLP), config.mlp_bias)
        down = linear(settings, "down_proj", (wide, narrow), (MLP, EMBED), config.mlp_bias)
        activation = ACTIVATIONS[config.hidden_act]
        contexts = with_dropout_keys(self, contexts)
        options: Any = {"deterministic": settings.deterministic}

        products = gate.product(x), up.product(x)
        if not all(rows.method.is_additive for rows in settings.adapter_rows):
            products = gate.kept(products[0]), up.kept(products[1])
        ffn = FrozenFFN(
            FrozenProjection(products[0], gate.kernel),
            FrozenProjection(products[1], up.kernel),
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
        windows = windows_of(contexts)
        hidden = replace_rows(settings.adapter_rows, hidden, replaced, windows)
        product = down.product(constrain(hidden, MLP_HIDDEN_AXES))
        outputs = dict[str, jax.Array]()
        for rows in settings.adapter_rows:
            update = experts.get(rows.name)
            if update is not None and update.hidden is not None:
                own = take_rows(rows, product, contexts[rows.name].window)
                outputs[rows.name] = own + update.output
            elif update is not None:
                outputs[rows.name] = update.output
        product = replace_rows(settings.adapter_rows, product, outputs, windows)
        contexts = with_dropout_keys(self, contexts)
        return down(hidden, contexts, product=product, **options)


class DecoderLayer(nn.Module):
    """Residual layer with the signature of `nn.scan`: carry in, carry and None out.

    `post_attention_layernorm` precedes the FFN, as in Llama. Families with norms after attention
    and FFN have `post_self_attn_layernorm` and `post_mlp_layernorm`. In a parallel block,
    `input_layernorm` precedes both.

    Attributes:
      settings: settings of all layers.
      attention: class of the module that mixes positions, with the signature of `SelfAttention`.
      attention_name: name of that module.
      ffn_name: name of the FFN's module.
    """

    settings: LayerSettings
    attention: Any = SelfAttention
    attention_name: str = SELF_ATTENTION
    ffn_name: str = FFN

    @nn.compact
    def __call__(
        self, x: jax.Array, context: TokenContext, layer_index: jax.Array
    ) -> tuple[jax.Array, KeysAndValues | None]:
        """The hidden states [B, S, D], and what the attention has for later layers."""
        config = self.settings.config
        contexts = {
            rows.name: _adapter_context(self.settings, rows, context, layer_index)
            for rows in self.settings.adapter_rows
        }
        x = constrain(x, HIDDEN_AXES)
        normed = self._block_input(x, "input_layernorm")
        attention = self.attention(self.settings, name=self.attention_name)
        update, kept = attention(normed, context, layer_index, contexts)
        x = x + self._block_output(update, "post_self_attn_layernorm")
        if not config.parallel_block:
            normed = self._block_input(x, "post_attention_layernorm")
        width = config.reader_ffn_width if self.ffn_name == WIDE_FFN else config.intermediate_size
        assert width is not None
        update = GatedMLP(self.settings, width, name=self.ffn_name)(normed, contexts)
        x = x + self._block_output(update, "post_mlp_layernorm")
        if context.layer_embeddings is not None:
            update = LayerEmbedding(self.settings, name=LAYER_EMBEDDING)
            x = x + update(x, context.layer_embeddings[layer_index], contexts)
        if config.layer_scale:
            ones, dtype = nn.initializers.ones, self.settings.storage.dtype
            scalar = frozen_leaf(self, "layer_scalar", ones, (1,), (NORM,), dtype)
            x = x * scalar.astype(x.dtype)[None, None]
        return constrain(x, HIDDEN_AXES), kept

    def _block_input(self, x: jax.Array, name: str) -> jax.Array:
        return norm(self.settings, name)(x) if self.settings.config.pre_norms else x

    def _block_output(self, update: jax.Array, name: str) -> jax.Array:
        config = self.settings.config
        if config.post_norms:
            update = norm(self.settings, name)(update)
        if config.residual_multiplier is not None:
            update = scaled(update, config.residual_multiplier)
        return update


def _adapter_context(
    settings: LayerSettings, rows: AdapterRows, context: TokenContext, layer_index: jax.Array
) -> AdapterContext:
    expert_groups = segment_ids = prompt_length = None
    window = window_of(rows, context.windows)
    token_mask = take_rows(rows, context.token_mask, window)
    if context.expert_groups is not None and rows.method.needs_expert_groups:
        expert_groups = take_rows(rows, context.expert_groups)
    if context.segment_ids is not None:
        segment_ids = take_rows(rows, context.segment_ids)
    if window is not None:
        token_mask = token_mask & window.mask[:, None]
    if isinstance(context.cache_position, BlockPosition):
        prompt_length = take_rows(rows, context.cache_position.prompt_length, window)
    return AdapterContext(
        token_mask,
        layer_index,
        settings.config.num_layers,
        expert_groups,
        segment_ids,
        fused_experts=settings.compute.experts == "fused",
        window=window,
        prompt_length=prompt_length,
    )
