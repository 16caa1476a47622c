"""Frozen parameters: their storage types, variables and projections."""

from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from moe_jax.config.model import FloatType, ModelConfig, StorageType
from moe_jax.config.parse import require, suggest
from moe_jax.errors import ConfigError
from moe_jax.layers.names import ADAPTERS, NARROW_PRODUCT, PARAMS, WIDE_PRODUCT
from moe_jax.layers.quantized import (
    DoubleScales,
    Kernel,
    Nf4Kernel,
    QuantizedKernel,
    ScaledKernel,
    quantize,
    quantized_product,
)
from moe_jax.sharding.axes import MLP, blocks


class Storage(NamedTuple):
    """Storage of the base, from a `StorageType`.

    Attributes:
      dtype: dtype of all leaves except quantized kernels.
      quantization: kind of `quantize` for the kernels of the layers' projections; None stores them
        in `dtype`.
    """

    dtype: jnp.dtype
    quantization: str | None


def storage_of(storage_type: StorageType | str) -> Storage:
    """Storage of the base for a `StorageType`.

    Raises:
      ConfigError: it is not a storage type.
    """
    known = get_args(StorageType)
    if storage_type not in known:
        raise ConfigError(
            f"dtype {storage_type!r}: not a storage type; {suggest(storage_type, known)}"
        )
    if storage_type in get_args(FloatType):
        return Storage(jnp.dtype(storage_type), None)
    return Storage(jnp.dtype("bfloat16"), storage_type)


def check_storage(storage: Storage, model: ModelConfig) -> None:
    """Raises `ConfigError` if a width of the model is odd: four-bit types pack inputs in pairs."""
    if storage.quantization not in ("nf4", "nf4_double"):
        return
    inputs = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "heads times head_dim": model.num_heads * model.head_dim,
    }
    if model.layer_embedding_width is not None:
        inputs["hidden_size_per_layer_input"] = model.layer_embedding_width
    if model.delta_net is not None:
        inputs["value heads times head_dim"] = model.delta_net.value_dim
    for name, size in inputs.items():
        require(
            size % 2 == 0,
            "param_dtype",
            f"{storage.quantization!r} packs inputs in pairs, and this model's {name} is {size}; "
            "use 'int8' or 'fp8'",
        )


BASE_INIT = nn.initializers.normal(stddev=0.02)
"""Initializer of random models; real ones are loaded."""


def frozen_leaf(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: jnp.dtype | str,
) -> jax.Array:
    """The leaf `name` of `module` in the `params` collection.

    Args:
      module: the module that owns the leaf, inside its compact method or `setup`.
      name: name of the leaf.
      init: initializer, for models that are not loaded.
      shape: shape of the leaf.
      axes: logical axes, one for each dimension; None where it is never divided.
      dtype: dtype in which the leaf is stored.
    """
    # Linen types the result as the box of the initializer, but returns the array in it.
    leaf: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)
    return leaf


def adapter_leaf(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> jax.Array:
    """Creates or reads a trainable float32 leaf of `module` in the `adapters` collection.

    Linen's `param` uses the `params` collection, which here is frozen.

    Args:
      module: module that owns the leaf, inside its compact method or `setup`.
      name: name of the leaf.
      init: initializer.
      shape: shape of the leaf.
      axes: logical axis of each dimension.
    """

    def create() -> Any:
        boxed = nn.with_logical_partitioning(init, axes)
        return boxed(module.make_rng(ADAPTERS), shape, jnp.float32)

    variable: Any = module.variable(ADAPTERS, name, create)
    return variable.value


def frozen_kernel(
    module: nn.Module,
    name: str,
    shape: tuple[int, int],
    axes: tuple[str, str],
    storage: Storage,
) -> Kernel:
    """The kernel `name` of a projection, [in, out], as stored.

    Args:
      module: the module that owns the leaf, inside its compact method or `setup`.
      name: name of the leaf.
      shape: shape of the kernel.
      axes: logical axes of the kernel.
      storage: storage of a new kernel; loaded ones keep their own.
    """
    kind = storage.quantization
    given = module.get_variable(PARAMS, name) if module.has_variable(PARAMS, name) else None
    if isinstance(given, QuantizedKernel):  # loaded quantized, whatever `storage` says
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
    """Logical axes of the arrays of a quantized kernel, as a kernel of axes.

    Args:
      kind: see `quantize`.
      axes: logical axes of the kernel, (in, out).
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


def frozen_product(x: jax.Array, kernel: Kernel) -> jax.Array:
    """`x W` in the dtype of x, of a stored kernel W [in, out]."""
    if isinstance(kernel, QuantizedKernel):
        return quantized_product(x, kernel)
    return jnp.dot(x, kernel.astype(x.dtype))


class FrozenLinear(nn.Module):
    """Frozen projection `y = x @ kernel + bias`, with `kernel` stored as [in, out].

    Attributes:
      in_features: width of the input.
      features: width of the result.
      axes: logical axes of the kernel, (in, out).
      use_bias: True if there is a bias.
      dtype: dtype of the product.
      storage: storage of the parameters.
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
        return frozen_product(x.astype(self.dtype), self.kernel)

    def kept(self, product: jax.Array) -> jax.Array:
        """Names the product, or what adapters made of it, for rematerialization."""
        return checkpoint_name(product, WIDE_PRODUCT if self.axes[1] == MLP else NARROW_PRODUCT)
