"""FLOP/s of the machine in large matrix products."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.timing import seconds_of

_WIDTHS = {"cpu": 1536}
"""Of the square matrices; on accelerators `_WIDE`, as they need more work to be kept busy."""

_WIDE = 8192
_LEAST_SECONDS = 0.1


class MatrixProduct:
    """Products of square matrices on every device at once, one after the other.

    Attributes:
      width: of the matrices.
      repeats: products of one measurement, enough for a tenth of a second.
      flops: operations of one measurement, over all devices, two for each multiply-add.
    """

    def __init__(self, dtype: str, devices: Sequence[Any]):
        """Compiles it and finds out how often to repeat it.

        Args:
          dtype: of the matrices and of the product.
          devices: that multiply.
        """
        self.width = _WIDTHS.get(devices[0].platform, _WIDE)
        mesh = Mesh(np.asarray(devices), ("devices",))
        shape = (len(devices), self.width, self.width)
        # Entries of this size keep the products' as large as the first factor's.
        deviation = self.width**-0.5

        def draw() -> tuple[jax.Array, jax.Array]:
            left, right = jax.random.split(jax.random.key(0))
            first = jax.random.normal(left, shape, jnp.dtype(dtype))
            return first, jax.random.normal(right, shape[1:], jnp.dtype(dtype)) * deviation

        def multiply(repeats: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
            step = lambda _, left: jnp.dot(left, second).astype(left.dtype)
            return jax.lax.fori_loop(0, repeats, step, first)

        by_device = NamedSharding(mesh, PartitionSpec("devices"))
        same = NamedSharding(mesh, PartitionSpec())
        self._factors = jax.jit(draw, out_shardings=(by_device, same))()
        self._multiply = jax.jit(multiply, out_shardings=by_device)
        self.repeats = 1
        self.seconds()  # compiles
        while self.seconds() < _LEAST_SECONDS:
            self.repeats *= 2
        self.flops = 2 * self.repeats * len(devices) * self.width**3

    def seconds(self) -> float:
        """Of one measurement."""
        product = lambda: jax.block_until_ready(self._multiply(self.repeats, *self._factors))
        return seconds_of(product)
