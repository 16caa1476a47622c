"""Random weights, made where they are needed, and random batches; needs jax and flax only."""

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
"""Of all weights but those of norms, which are one."""


def random_params(abstract: Any, shardings: Any, param_dtype: str, seed: int = 0) -> Any:
    """A base of random weights, each made on the devices that keep it.

    Layers are drawn one by one, so that what is held beside the weights is one layer's kernel in
    float32, before it is rounded or quantised.

    Args:
      abstract: shapes and types of the leaves, as `Program.abstract_params`.
      shardings: where they live, as `Program.param_shardings`; None is one device.
      param_dtype: how kernels are kept, a `StorageType`.
      seed: of the weights.
    """
    kind = storage_of(param_dtype).quantization
    is_kernel = lambda leaf: isinstance(leaf, QuantizedKernel)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_kernel)
    places = [None] * len(leaves)
    if shardings is not None:
        places = jax.tree.leaves(shardings, is_leaf=is_kernel)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    @functools.cache
    def drawing(shape: tuple[int, ...], stored: Any, form: Any, *places: Any) -> Any:
        """Compiled once for all leaves that are alike."""

        def kernel(key: jax.Array) -> Any:
            values = DEVIATION * jax.random.normal(key, shape[-2:], jnp.float32)
            return quantize(values, str(kind)) if stored == kind else values.astype(stored)

        def drawn(key: jax.Array) -> Any:
            if len(shape) == 2:
                return kernel(key)
            return jax.lax.map(kernel, jax.random.split(key, shape[0]))

        return jax.jit(drawn, out_shardings=jax.tree.unflatten(form, places))

    def made(path: Any, leaf: Any, place: Any, key: jax.Array) -> Any:
        if path[-1].key == "scale":
            return jax.device_put(np.ones(leaf.shape, leaf.dtype), place)
        # Kernels that are quantised have a tree of places; all of a shape have the same.
        own, form = jax.tree.flatten(place)
        return drawing(leaf.shape, kind if is_kernel(leaf) else leaf.dtype, form, *own)(key)

    values = [
        made(path, leaf, place, key)
        for (path, leaf), place, key in zip(leaves, places, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


def params_of(program: "Program", seed: int = 0) -> Any:
    """A random base for a training program."""
    dtype = program.config.base.param_dtype
    return random_params(program.abstract_params, program.param_shardings, dtype, seed)


def random_like(shapes: Any) -> Any:
    """Small random numbers, trues and zeros of the shapes and types of a tree's leaves."""

    def one(index: int, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return DEVIATION * jax.random.normal(jax.random.key(index), leaf.shape, leaf.dtype)
        return jnp.full(leaf.shape, leaf.dtype == jnp.bool, leaf.dtype)

    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [one(index, leaf) for index, leaf in enumerate(leaves)])


def random_batch(model: ModelConfig, rows: int, length: int, seed: int = 0) -> Batch:
    """Rows without padding, of which every token but the first is a target."""
    shape = (rows, length)
    fields: dict[str, np.ndarray] = dict.fromkeys(Batch._fields, np.zeros(shape, np.int32))
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, shape)
    fields["tokens"] = tokens.astype(np.int32)
    fields["loss_mask"] = np.ones(shape, bool)
    fields["labels"] = np.zeros(shape, np.float32)
    fields["segment_ids"] = np.ones(shape, np.int32)
    fields["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Batch(**fields)
