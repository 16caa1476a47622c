"""A trainable leaf with its logical axes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.collections import ADAPTERS


def adapter_leaf(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> jax.Array:
    """A trainable float32 leaf of `module` in the `adapters` collection.

    Linen's `param` only knows the `params` collection, which here is frozen.
    """

    def make() -> Any:
        boxed = nn.with_logical_partitioning(init, axes)
        return boxed(module.make_rng(ADAPTERS), shape, jnp.float32)

    variable: Any = module.variable(ADAPTERS, name, make)
    return variable.value
