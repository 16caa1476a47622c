"""Frozen parameters with their logical axes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.layers.collections import PARAMS
from moe_jax.layers.quantized import (
    DoubleScales,
    Kernel,
    Nf4Kernel,
    QuantizedKernel,
    ScaledKernel,
    quantize,
)
from moe_jax.layers.storage import Storage
from moe_jax.sharding.axes import blocks

BASE_INIT = nn.initializers.normal(stddev=0.02)
"""Used for random models only; real ones are loaded."""


def frozen_leaf(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: jnp.dtype | str,
) -> jax.Array:
    """The leaf `name` of `module` in the `params` collection.

    Args:
      module: the module that owns the leaf, inside its compact method or `setup`.
      name: of the leaf.
      init: initialiser, for models that are not loaded.
      shape: of the leaf.
      axes: logical axes, one for each dimension.
      dtype: in which the leaf is stored.
    """
    # Linen types the boxed initialiser's result as the box, but hands out the array in it.
    leaf: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    return leaf


def frozen_kernel(
    module: nn.Module,
    name: str,
    shape: tuple[int, int],
    axes: tuple[str, str],
    storage: Storage,
) -> Kernel:
    """The leaf `name` of a projection, [in, out], as it is given; `init` follows `storage`.

    Args:
      module: the module that owns the leaf, inside its compact method or `setup`.
      name: of the leaf.
      shape: of the kernel.
      axes: its logical axes.
      storage: how it is kept.
    """
    kind = storage.quantization
    given = module.get_variable(PARAMS, name) if module.has_variable(PARAMS, name) else None
    if isinstance(given, QuantizedKernel):  # whoever loaded it need not say so again
        return given
    if kind is None:
        return frozen_leaf(module, name, BASE_INIT, shape, axes, storage.dtype)

    def init(key: jax.Array) -> Any:
        quantized = quantize(BASE_INIT(key, shape, jnp.float32), kind)
        box = lambda leaf, spec: nn.LogicallyPartitioned(leaf, tuple(spec))
        return jax.tree.map(box, quantized, quantized_axes(kind, axes))

    kernel: Any = module.param(name, init)
    return kernel


def quantized_axes(kind: str, axes: tuple[str, str]) -> Any:
    """The logical axes of each array of a kernel that `quantize` made, in its place.

    Args:
      kind: see `quantize`.
      axes: of the kernel, (in, out).
    """
    inputs, features = axes
    whole: Any = PartitionSpec(inputs, features)
    if kind in ("int8", "fp8"):
        by_feature: Any = PartitionSpec(features)
        return ScaledKernel(whole, by_feature)
    by_block: Any = PartitionSpec(blocks(inputs), features)
    if kind == "nf4":
        return Nf4Kernel(whole, by_block)
    by_output: Any = PartitionSpec(None, features)
    return Nf4Kernel(whole, DoubleScales(by_block, by_output, by_output))
