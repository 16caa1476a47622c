"""FLOP/s of large matrix products on this machine."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.timing import seconds_of

_WIDTHS = {"cpu": 1536}
"""Width of the square matrices by platform; other platforms use `_WIDE`."""

_WIDE = 8192
_LEAST_SECONDS = 0.1


class MatrixProduct:
    """Consecutive products of square matrices, on all devices in parallel.

    Attributes:
      width: width of the matrices.
      repeats: number of products of one measurement, which takes a tenth of a second or more.
      flops: FLOPs of one measurement on all devices, 2 for each multiply-add.
    """

    def __init__(self, dtype: str, devices: Sequence[Any]):
        """Compiles the product and determines the number of repeats.

        Args:
          dtype: dtype of the matrices and of the product.
          devices: devices to measure.
        """
        self.width = _WIDTHS.get(devices[0].platform, _WIDE)
        mesh = Mesh(np.asarray(devices), ("devices",))
        shape = (len(devices), self.width, self.width)
        # With this deviation the products keep the deviation of the first factor.
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
        """Runs one measurement and returns its seconds."""
        product = lambda: jax.block_until_ready(self._multiply(self.repeats, *self._factors))
        return seconds_of(product)
