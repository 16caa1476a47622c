"""Random weights, created on their devices, and random batches. Needs jax and flax only."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.model import ModelConfig
from moe_jax.data.batch import Batch
from moe_jax.layers.frozen import storage_of
from moe_jax.layers.quantized import QuantizedKernel, quantize

if TYPE_CHECKING:
    from moe_jax.training.step.program import Program

DEVIATION = 0.02
"""Standard deviation of all weights except for the scales of norms, which are one."""


def random_params(abstract: Any, shardings: Any, param_dtype: str, seed: int = 0) -> Any:
    """Draws the random weights of a base, each on its devices.

    Layers are drawn one at a time, so that only one layer's kernel is in memory in float32 before
    it is rounded or quantized.

    Args:
      abstract: shapes and dtypes of the leaves, see `Program.abstract_params`.
      shardings: shardings of the leaves, see `Program.param_shardings`; None for one device.
      param_dtype: storage type of the kernels, a `StorageType`.
      seed: seed of the weights.
    """
    kind = storage_of(param_dtype).quantization
    is_kernel = lambda leaf: isinstance(leaf, QuantizedKernel)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_kernel)
    places = [None] * len(leaves)
    if shardings is not None:
        places = jax.tree.leaves(shardings, is_leaf=is_kernel)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    @functools.cache
    def draw_function(shape: tuple[int, ...], stored: Any, form: Any, *places: Any) -> Any:
        """Returns the compiled function that draws a leaf, shared by equal leaves."""

        def kernel(key: jax.Array) -> Any:
            values = DEVIATION * jax.random.normal(key, shape[-2:], jnp.float32)
            return quantize(values, str(kind)) if stored == kind else values.astype(stored)

        def draw_leaf(key: jax.Array) -> Any:
            if len(shape) == 2:
                return kernel(key)
            return jax.lax.map(kernel, jax.random.split(key, shape[0]))

        return jax.jit(draw_leaf, out_shardings=jax.tree.unflatten(form, places))

    def random_leaf(path: Any, leaf: Any, place: Any, key: jax.Array) -> Any:
        if path[-1].key == "scale":
            return jax.device_put(np.ones(leaf.shape, leaf.dtype), place)
        # A quantized kernel has a tree of shardings, equal for equal shapes.
        leaf_places, form = jax.tree.flatten(place)
        stored = kind if is_kernel(leaf) else leaf.dtype
        return draw_function(leaf.shape, stored, form, *leaf_places)(key)

    values = [
        random_leaf(path, leaf, place, key)
        for (path, leaf), place, key in zip(leaves, places, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def params_of(program: "Program", seed: int = 0) -> Any:
    """Draws a random base for a training program."""
    dtype = program.config.base.param_dtype
    return random_params(program.abstract_params, program.param_shardings, dtype, seed)


def random_like(shapes: Any) -> Any:
    """Arrays like a tree's leaves: small random floats, True for booleans, zero for integers."""

    def random_array(index: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return DEVIATION * jax.random.normal(jax.random.key(index), leaf.shape, leaf.dtype)
        return jnp.full(leaf.shape, leaf.dtype == jnp.bool, leaf.dtype)

    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        tree, [random_array(index, leaf) for index, leaf in enumerate(leaves)]
    )


def random_batch(model: ModelConfig, rows: int, length: int, seed: int = 0) -> Batch:
    """Random rows without padding; every token except for the first is a target."""
    shape = (rows, length)
    fields: dict[str, np.ndarray] = dict.fromkeys(Batch._fields, np.zeros(shape, np.int32))
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, shape)
    fields["tokens"] = tokens.astype(np.int32)
    fields["loss_mask"] = np.ones(shape, bool)
    fields["labels"] = fields["reference_log_probs"] = np.zeros(shape, np.float32)
    fields["segment_ids"] = np.ones(shape, np.int32)
    fields["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(**fields)
