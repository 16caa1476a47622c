"""FLOP/s of large matrix products on devices: of known chips by data sheet, of others measured."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.compiled.chips import chip_of_kind

_WIDTHS = {"cpu": 1536}
"""Width of the square matrices by platform; other platforms use `_WIDE`."""

_WIDE = 8192
_QUICK_WIDTHS = {"cpu": 768}
"""Width by platform where the rate is measured at the start of a run."""

_LEAST_SECONDS = 0.1
_MEASUREMENTS = 3


class MatrixRate(NamedTuple):
    """Rate that the speed of a step is compared with.

    Attributes:
      flops: FLOP/s of large matrix products on all devices together.
      source: where it is from.
    """

    flops: float
    source: str

    def describe(self) -> str:
        """The rate in TFLOP/s and its source."""
        return f"{self.flops / 1e12:,.4g} TFLOP/s ({self.source})"


def matrix_rate(devices: Sequence[Any], dtype: str, given: float | None = None) -> MatrixRate:
    """Rate of products in `dtype`, of some devices of all processes together.

    Products of devices that are not among `moe_jax.compiled.chips.CHIPS`, such as CPUs, are
    measured, on those of this process. That takes about half a second, once in a process.

    Args:
      devices: devices.
      dtype: dtype of the products.
      given: TFLOP/s of one device; None takes that of the data sheet or measures.
    """
    kind = devices[0].device_kind
    if given is not None:
        return MatrixRate(given * 1e12 * len(devices), "as given by logging.matrix_tflops")
    chip = chip_of_kind(kind)
    if chip is not None:
        return MatrixRate(chip.peak(dtype) * len(devices), f"peak of {kind} in {dtype}")
    local = tuple(d for d in devices if d.process_index == jax.process_index())
    measured = _measured_rate(local, dtype) * len(devices) / len(local)
    return MatrixRate(measured, f"measured product of {dtype}")


@functools.cache
def _measured_rate(devices: tuple[Any, ...], dtype: str) -> float:
    product = MatrixProduct(dtype, devices, _QUICK_WIDTHS.get(devices[0].platform))
    return product.flops / min(product.seconds() for _ in range(_MEASUREMENTS))


class MatrixProduct:
    """Consecutive products of square matrices, on all devices in parallel.

    Attributes:
      width: width of the matrices.
      repeats: number of products of one measurement, which takes a tenth of a second or more.
      flops: FLOPs of one measurement on all devices, 2 for each multiply-add.
    """

    def __init__(self, dtype: str, devices: Sequence[Any], width: int | None = None):
        """Compiles the product and determines the number of repeats.

        Args:
          dtype: dtype of the matrices and of the product.
          devices: devices to measure.
          width: width of the matrices; None for the usual one of the platform.
        """
        self.width = width or _WIDTHS.get(devices[0].platform, _WIDE)
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
        start = time.perf_counter()
        jax.block_until_ready(self._multiply(self.repeats, *self._factors))
        return time.perf_counter() - start
