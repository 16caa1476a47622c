"""How the frozen parameters are kept, in types."""

from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moe_jax.config.model import FloatType, ModelConfig, StorageType
from moe_jax.config.parse import require, suggest
from moe_jax.errors import ConfigError
from moe_jax.layers.names import NARROW_PRODUCT, PARAMS, WIDE_PRODUCT
from moe_jax.layers.quantized import (
    DoubleScales,
    Kernel,
    Nf4Kernel,
    QuantizedKernel,
    ScaledKernel,
    frozen_product,
    quantize,
)
from moe_jax.sharding.axes import MLP, blocks


class Storage(NamedTuple):
    """What a `StorageType` says.

    Attributes:
      dtype: of all leaves but quantised kernels.
      quantization: what `quantize` makes of the kernels of the layers' projections; None leaves
        them in `dtype`.
    """

    dtype: jnp.dtype
    quantization: str | None


def storage_of(kept: StorageType | str) -> Storage:
    """The types of a `StorageType`.

    Raises:
      ConfigError: it is none.
    """
    if kept not in get_args(StorageType):
        raise ConfigError(
            f"dtype {kept!r}: no type to keep a base in; {suggest(kept, get_args(StorageType))}"
        )
    if kept in get_args(FloatType):
        return Storage(jnp.dtype(kept), None)
    return Storage(jnp.dtype("bfloat16"), kept)


def check_storage(storage: Storage, model: ModelConfig) -> None:
    """Refuses, with `require`, a model that cannot be kept so: four bits pack inputs in pairs."""
    if storage.quantization not in ("nf4", "nf4_double"):
        return
    inputs = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "heads times head_dim": model.num_heads * model.head_dim,
    }
    for name, size in inputs.items():
        require(
            size % 2 == 0,
            "param_dtype",
            f"{storage.quantization!r} packs inputs in pairs, and this model's {name} is {size}; "
            "use 'int8' or 'fp8'",
        )


# FIXME docstring of the merged layers.leaf:
# """Frozen parameters with their logical axes."""


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


# FIXME docstring of the merged layers.projection:
# """The frozen linear map that everything else is added to."""


class FrozenLinear(nn.Module):
    """The parameters of `y = x @ kernel + bias`, with `kernel` stored as [in, out].

    Attributes:
      in_features: width of the input.
      features: width of the result.
      axes: logical axes of the kernel, (in, out).
      use_bias: whether there is a bias.
      dtype: type in which the product is computed.
      storage: types in which the parameters are stored.
    """

    in_features: int
    features: int
    axes: tuple[str, str]
    use_bias: bool
    dtype: jnp.dtype
    storage: Storage

    def setup(self) -> None:
        shape = (self.in_features, self.features)
        self.kernel = frozen_kernel(self, "kernel", shape, self.axes, self.storage)
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = frozen_leaf(self, "bias", zeros, shape[1:], self.axes[1:], self.storage.dtype)
            self.bias = bias.astype(self.dtype)
        else:
            self.bias = None

    def product(self, x: jax.Array) -> jax.Array:
        """`x @ kernel`, without the bias."""
        name = WIDE_PRODUCT if self.axes[1] == MLP else NARROW_PRODUCT
        return checkpoint_name(frozen_product(x.astype(self.dtype), self.kernel), name)
