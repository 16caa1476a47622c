"""Decoder layers of several kinds in a repeating pattern, scanned period by period.

The variables of a module, such as `linear_attn`, are stacked over the layers that have it, in
their order (`ModelConfig.layers_with`). Modules that all layers have, such as `mlp`, are stacked as
in models whose layers are equal. A scan takes one period of the pattern at a time, for example
three layers with linear attention and one with full attention.
"""

import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from moe_jax.config.attention import GLOBAL_ATTENTION, LINEAR_ATTENTION, SELF_ATTENTION
from moe_jax.config.model import ModelConfig
from moe_jax.layers.names import ADAPTERS, CACHE, CACHE_UPDATES, PARAMS, ROUTER, ROUTING
from moe_jax.models.attention import GlobalAttention, SelfAttention
from moe_jax.models.decoder import DecoderLayer
from moe_jax.models.delta_net import GatedDeltaNet
from moe_jax.models.layer_inputs import LayerSettings, TokenContext
from moe_jax.models.remat import REMAT_POLICIES
from moe_jax.sharding.axes import LAYERS

STACKED = (PARAMS, ADAPTERS, ROUTER, ROUTING, CACHE, CACHE_UPDATES)
"""Collections with a leading axis of layers."""

_ATTENTION = {
    SELF_ATTENTION: SelfAttention,
    GLOBAL_ATTENTION: GlobalAttention,
    LINEAR_ATTENTION: GatedDeltaNet,
}

_RANDOM_STREAMS = (PARAMS, ADAPTERS, "dropout")

Variables = dict[str, dict[str, Any]]
"""Variables by collection and module of a layer."""


def layer_of(settings: LayerSettings, layer: int, **options: Any) -> DecoderLayer:
    """The module of a layer.

    Args:
      settings: settings of all layers.
      layer: index of the layer.
      options: attributes of every Linen module.
    """
    name = settings.config.attention_module(layer)
    return DecoderLayer(settings, _ATTENTION[name], name, **options)


def pattern_length(config: ModelConfig) -> int:
    """Number of layers of the shortest pattern that the layers repeat."""
    kinds = config.layer_types or ("full_attention",)
    lengths = range(1, config.num_layers + 1)
    return next(n for n in lengths if config.num_layers % n == 0 and kinds[:-n] == kinds[n:])


class MixedLayers(nn.Module):
    """All decoder layers, called like the scanned layers of a model whose layers are equal.

    Each layer is a function of its slice of the variables, so that layers of two kinds can share a
    stack. Linen's `nn.scan` has one stack for each module of its body.
    """

    settings: LayerSettings

    @nn.compact
    def __call__(
        self, x: jax.Array, context: TokenContext, layer_indices: jax.Array
    ) -> tuple[jax.Array, None]:
        config = self.settings.config
        length = pattern_length(config)
        given = {name: tree for name, tree in self.variables.items() if name in STACKED}
        keys = {name: self.make_rng(name) for name in _RANDOM_STREAMS if self.has_rng(name)}

        def period(x: jax.Array, inputs: tuple[Variables, jax.Array]) -> tuple[jax.Array, Any]:
            variables, indices = inputs
            written = []
            for layer in range(length):
                own = _of_layer(config, variables, layer)
                x, new = self._layer(layer)(own, x, context, indices[layer], keys)
                written.append(new)
            return x, _stacked(written)

        periods = jax.tree.map(lambda leaf: _split(leaf, config.num_layers // length), given)
        x, written = jax.lax.scan(period, x, (periods, layer_indices.reshape(-1, length)))
        joined = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), written)
        for collection, modules in nn.meta.add_axis(joined, 0, {nn.PARTITION_NAME: LAYERS}).items():
            for name, variables in modules.items():
                self.put_variable(collection, name, variables)
        return x, None

    def _layer(self, layer: int) -> Any:
        """A layer as a function; returns hidden states and the variables that it wrote."""
        module = layer_of(self.settings, layer, parent=None)
        initializes = self.is_initializing()
        mutable = [name for name in STACKED if self.is_mutable_collection(name)]

        def apply(
            variables: Variables,
            x: jax.Array,
            context: TokenContext,
            index: jax.Array,
            keys: dict[str, jax.Array],
        ) -> tuple[jax.Array, Variables]:
            rngs = {name: jax.random.fold_in(key, index) for name, key in keys.items()}
            result: Any
            if initializes:
                result = module.init_with_output(rngs, x, context, index, mutable=mutable)
            else:
                result = module.apply(variables, x, context, index, rngs=rngs, mutable=mutable)
            (x, _), new = result
            return x, new

        if self.settings.compute.remat == "none":
            return apply
        policy = REMAT_POLICIES[self.settings.compute.remat]
        return jax.checkpoint(apply, policy=policy, prevent_cse=False)


def _split(leaf: jax.Array, periods: int) -> jax.Array:
    """A stack of layers as [periods, layers of one period, ...]."""
    return leaf.reshape(periods, -1, *leaf.shape[1:])


def _of_layer(config: ModelConfig, variables: Variables, layer: int) -> Variables:
    """The variables of one layer of a period, from those of the period."""
    result: Variables = {}
    for collection, modules in variables.items():
        result[collection] = {}
        for name, tree in modules.items():
            layers = config.layers_with(name)
            if layer in layers:
                take = operator.itemgetter(layers.index(layer))
                result[collection][name] = jax.tree.map(take, tree)
    return result


def _stacked(written: list[Variables]) -> Variables:
    """The variables of several layers, stacked over the layers that have them."""
    parts: dict[tuple[str, str], list[Any]] = {}
    for new in written:
        for collection, modules in new.items():
            for name, tree in modules.items():
                parts.setdefault((collection, name), []).append(tree)
    return unflatten_dict(
        {
            path: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
            for path, trees in parts.items()
        }
    )
