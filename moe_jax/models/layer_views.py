"""The variables of stacked layers as separate arrays of each layer.

A CPU program that takes a layer out of a stack copies it, before it multiplies with it. A step of
decoding, which reads each weight once, then takes almost three times as long. Models with
`scan_layers=False` read separate arrays instead.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.model import ModelConfig
from moe_jax.sharding.axes import LAYERS


def split_layers(config: ModelConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the stacked variables `layers` of a tree by `layers_0`, `layers_1`, ...

    Args:
      config: architecture of the model.
      tree: variables of a model, or of an adapter, with `scan_layers=True`: parameters, adapters or
        cache. Arrays of NumPy or JAX, or tracers.

    Returns:
      The variables with `scan_layers=False`. The arrays are slices.
    """
    if LAYERS not in tree:
        return dict(tree)
    layers: dict[str, Any] = {name: part for name, part in tree.items() if name != LAYERS}
    for module, stacked in tree[LAYERS].items():
        for index, layer in enumerate(config.layers_with(module)):
            of_layer = layers.setdefault(f"{LAYERS}_{layer}", {})
            of_layer[module] = jax.tree.map(lambda leaf, index=index: leaf[index], stacked)
    return layers


def layer_views(config: ModelConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """`split_layers` of arrays on a CPU, where the slices share the memory of the stacked arrays.

    A slice whose address is not a multiple of XLA's alignment of 64 bytes is copied.
    """
    hosted = {**tree, LAYERS: jax.tree.map(np.asarray, tree[LAYERS])} if LAYERS in tree else tree
    split = split_layers(config, hosted)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=True), split)


def join_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_layers`: stacks the variables `layers_0`, `layers_1`, ... as `layers`.

    The layers must have equal modules (`ModelConfig.has_equal_layers`). A tree without them, and
    so one of a model with `scan_layers=True`, stays as it is.
    """
    names = sorted(
        (name for name in tree if name.startswith(f"{LAYERS}_")),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    if not names:
        return dict(tree)
    rest = {name: part for name, part in tree.items() if name not in names}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[name] for name in names))
    return rest | {LAYERS: stacked}
