"""Placement of equal arrays of all processes on a mesh that may span several processes."""

from typing import Any

import jax
import numpy as np


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays on devices, of which other processes may hold some.

    Args:
      tree: NumPy arrays, or jax arrays on devices of this process, with the same values in all
        processes.
      shardings: sharding of each array, or of all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(array: Any, sharding: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)
