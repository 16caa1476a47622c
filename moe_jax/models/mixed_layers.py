"""Decoder layers of several kinds in a repeating pattern, scanned period by period.

The variables of a module, such as `linear_attn`, are stacked over the layers that have it, in
their order (`ModelConfig.layers_with`). Modules that all layers have, such as `mlp`, are stacked as
in models whose layers are equal. A scan takes one period of the pattern at a time, for example
three layers with linear attention and one with full attention.

Layers that attend to keys and values of earlier layers are scanned after those, whose carry holds
the keys and values of the last layer of each kind.
"""

import functools
import operator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from moe_jax.config.attention import (
    GLOBAL_ATTENTION,
    LINEAR_ATTENTION,
    READERS,
    SELF_ATTENTION,
)
from moe_jax.config.model import ModelConfig
from moe_jax.layers.kv_cache import BY_POSITION, KeysAndValues
from moe_jax.layers.names import ADAPTERS, CACHE, CACHE_UPDATES, PARAMS, ROUTER, ROUTING
from moe_jax.models.attention import (
    GlobalAttention,
    GlobalAttentionReader,
    SelfAttention,
    SelfAttentionReader,
)
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
    READERS[SELF_ATTENTION]: SelfAttentionReader,
    READERS[GLOBAL_ATTENTION]: GlobalAttentionReader,
}

_RANDOM_STREAMS = (PARAMS, ADAPTERS, "dropout")

Variables = dict[str, dict[str, Any]]
"""Variables by collection and module of a layer."""

Kept = dict[str, KeysAndValues]
"""Keys and values of the last layer of each kind, by the name of its module."""


def layer_of(settings: LayerSettings, layer: int, **options: Any) -> DecoderLayer:
    """The module of a layer.

    Args:
      settings: settings of all layers.
      layer: index of the layer.
      options: attributes of every Linen module.
    """
    config = settings.config
    name = config.attention_module(layer)
    return DecoderLayer(settings, _ATTENTION[name], name, config.ffn_module(layer), **options)


def pattern_length(config: ModelConfig, layers: range) -> int:
    """Number of layers of the shortest pattern that these layers repeat."""
    kinds = [config.attention_module(layer) for layer in layers]
    lengths = range(1, len(kinds) + 1)
    return next(n for n in lengths if len(kinds) % n == 0 and kinds[:-n] == kinds[n:])


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
        keys = {name: self.make_rng(name) for name in _RANDOM_STREAMS if self.has_rng(name)}
        readers = config.reader_layers
        x, kept, written = self._scan(range(readers.start), x, context, layer_indices, keys)
        if readers:
            if context.cache_position is not None:
                kept = self._with_cache(kept)
            context = context._replace(kept=kept)
            x, _, rest = self._scan(readers, x, context, layer_indices, keys)
            written = _concatenated(written, rest)
        boxed = nn.meta.add_axis(written, 0, {nn.PARTITION_NAME: LAYERS})
        for collection, modules in boxed.items():
            for name, variables in modules.items():
                self.put_variable(collection, name, variables)
        return x, None

    def _scan(
        self,
        layers: range,
        x: jax.Array,
        context: TokenContext,
        layer_indices: jax.Array,
        keys: dict[str, jax.Array],
    ) -> tuple[jax.Array, Kept, Variables]:
        """Hidden states after consecutive layers, what they keep, and the variables they wrote."""
        config = self.settings.config
        pattern = layers[: pattern_length(config, layers)]
        stacked, indexed = self._given(layers)

        def period(
            carry: tuple[jax.Array, Kept], inputs: tuple[Variables, jax.Array]
        ) -> tuple[tuple[jax.Array, Kept], Variables]:
            (x, kept), (of_period, indices) = carry, inputs
            written = []
            for place, layer in enumerate(pattern):
                apply = self._layer(layer, pattern)
                x, new, variables = apply(of_period, indexed, x, context, indices[place], keys)
                if new is not None:
                    kept = {**kept, config.attention_module(layer): new._replace(cached=None)}
                written.append(variables)
            return (x, kept), _stacked(written)

        split = functools.partial(_split, periods=len(layers) // len(pattern))
        indices = layer_indices[layers.start : layers.stop]
        inputs = jax.tree.map(split, (stacked, indices))
        one = jax.tree.map(lambda leaf: leaf[0], inputs)
        kept: Kept = {}
        if config.has_readers:
            (_, shapes), _ = jax.eval_shape(period, (x, kept), one)
            kept = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (x, kept), written = jax.lax.scan(period, (x, kept), inputs)
        joined = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), written)
        return x, kept, joined

    def _given(self, layers: range) -> tuple[Variables, dict[str, Any]]:
        """The variables of these layers, and parameters of all layers, by module.

        The latter are of modules that other layers have too. Each layer takes its own of them,
        since a part of a stack would be a copy.
        """
        config = self.settings.config
        stacked: Variables = {name: {} for name in STACKED if name in self.variables}
        indexed: dict[str, Any] = {}
        for collection, modules in stacked.items():
            for name, tree in self.variables[collection].items():
                having = config.layers_with(name)
                own = [place for place, layer in enumerate(having) if layer in layers]
                if len(own) == len(having):
                    modules[name] = tree
                elif own and collection == PARAMS:
                    indexed[name] = tree
                elif own:
                    take = operator.itemgetter(slice(own[0], own[-1] + 1))
                    modules[name] = jax.tree.map(take, tree)
        return stacked, indexed

    def _with_cache(self, kept: Kept) -> Kept:
        """The same with those of earlier tokens, which the carry would copy in each period."""
        result: Kept = {}
        for name, new in kept.items():
            key, value = (self.variables[CACHE][name][part][-1] for part in BY_POSITION)
            result[name] = new._replace(cached=(key, value))
        return result

    def _layer(self, layer: int, pattern: range) -> Any:
        """A layer of a pattern as a function of the variables of one period.

        It returns hidden states, what the layer keeps, and what it wrote. It takes its part of the
        variables itself: parts that it was given would be copied for the backward pass.
        """
        module = layer_of(self.settings, layer, parent=None)
        initializes = self.is_initializing()
        mutable = [name for name in STACKED if self.is_mutable_collection(name)]

        def apply(
            of_period: Variables,
            indexed: dict[str, Any],
            x: jax.Array,
            context: TokenContext,
            index: jax.Array,
            keys: dict[str, jax.Array],
        ) -> tuple[jax.Array, KeysAndValues | None, Variables]:
            variables = _of_layer(self.settings.config, of_period, pattern, layer)
            if indexed:
                own = jax.tree.map(lambda leaf: _at(leaf, index), indexed)
                variables = {**variables, PARAMS: {**variables[PARAMS], **own}}
            rngs = {name: jax.random.fold_in(key, index) for name, key in keys.items()}
            result: Any
            if initializes:
                result = module.init_with_output(rngs, x, context, index, mutable=mutable)
            else:
                result = module.apply(variables, x, context, index, rngs=rngs, mutable=mutable)
            (x, kept), new = result
            return x, kept, new

        if self.settings.compute.remat == "none":
            return apply
        policy = REMAT_POLICIES[self.settings.compute.remat]
        return jax.checkpoint(apply, policy=policy, prevent_cse=False)


def _at(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _split(leaf: jax.Array, periods: int) -> jax.Array:
    """A stack of layers as [periods, layers of one period, ...]."""
    return leaf.reshape(periods, -1, *leaf.shape[1:])


def _of_layer(config: ModelConfig, variables: Variables, pattern: range, layer: int) -> Variables:
    """The variables of one layer of a pattern, from those of one period."""
    result: Variables = {}
    for collection, modules in variables.items():
        result[collection] = {}
        for name, tree in modules.items():
            layers = [other for other in config.layers_with(name) if other in pattern]
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


def _concatenated(first: Variables, second: Variables) -> Variables:
    """The variables of consecutive layers."""
    joined: Variables = {}
    for collection in first | second:
        one, two = first.get(collection, {}), second.get(collection, {})
        both = {
            name: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one[name], two[name])
            for name in one.keys() & two.keys()
        }
        joined[collection] = {**one, **two, **both}
    return joined
