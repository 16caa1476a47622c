"""Embeddings of each layer (Gemma 3n and 4): a second table, and what a layer adds of it.

A token has a narrow embedding for each layer, besides that of the model. P is its width.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterContext
from moe_jax.layers.activation import ACTIVATIONS, gated, scaled
from moe_jax.layers.frozen import BASE_INIT, frozen_leaf
from moe_jax.layers.vocabulary import TokenEmbedding
from moe_jax.models.layer_inputs import LayerSettings, linear, norm, with_dropout_keys
from moe_jax.sharding.axes import BATCH, EMBED, HEADS, LENGTH, constrain


class LayerEmbeddings(nn.Module):
    """The embeddings of all layers: rows of a table, plus a projection of the model's embedding.

    Leaves: `embed_tokens/embedding` [V, L P], `projection` [D, L P] and `norm/scale` [P].
    """

    settings: LayerSettings

    @nn.compact
    def __call__(self, tokens: jax.Array, embedded: jax.Array) -> jax.Array:
        """Embeddings [L, B, S, P] of tokens [B, S].

        Args:
          tokens: ids.
          embedded: embeddings of the model, [B, S, D].
        """
        settings, config = self.settings, self.settings.config
        width, depth = config.layer_embedding_width, config.num_layers
        assert width is not None
        dtype, storage = settings.dtype, settings.storage.dtype
        features = depth * width
        table = TokenEmbedding(
            config.vocab_size, features, dtype, storage, width**0.5, name="embed_tokens"
        )
        shape, axes = (config.hidden_size, features), (EMBED, HEADS)
        kernel = frozen_leaf(self, "projection", BASE_INIT, shape, axes, storage)
        by_layer = (*tokens.shape, depth, width)
        projected = scaled(embedded @ kernel.astype(dtype), config.hidden_size**-0.5)
        projected = norm(settings, "norm")(projected.reshape(by_layer))
        both = scaled(projected + table(tokens).reshape(by_layer), 2**-0.5)
        return constrain(jnp.moveaxis(both, 2, 0), (None, BATCH, LENGTH, None))


class LayerEmbedding(nn.Module):
    """The part of a layer after its FFN: `norm((act(x W_gate) * e) W_projection)`."""

    settings: LayerSettings

    @nn.compact
    def __call__(
        self, x: jax.Array, embedding: jax.Array, contexts: Mapping[str, AdapterContext]
    ) -> jax.Array:
        """The term that is added to the hidden states [B, S, D].

        Args:
          x: the hidden states.
          embedding: embeddings of this layer, [B, S, P].
          contexts: context of each adapter.
        """
        settings, config = self.settings, self.settings.config
        narrow, wide = embedding.shape[-1], config.hidden_size
        options: Any = {"deterministic": settings.deterministic}
        contexts = with_dropout_keys(self, contexts)
        gate = linear(settings, "per_layer_input_gate", (wide, narrow), (EMBED, HEADS), False)
        hidden = gated(ACTIVATIONS[config.hidden_act], gate(x, contexts, **options), embedding)
        contexts = with_dropout_keys(self, contexts)
        project = linear(settings, "per_layer_projection", (narrow, wide), (HEADS, EMBED), False)
        return norm(settings, "norm")(project(hidden, contexts, **options))
