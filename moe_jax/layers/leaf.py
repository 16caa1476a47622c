"""A frozen parameter with its logical axes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
