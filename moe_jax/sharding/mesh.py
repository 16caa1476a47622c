"""The mesh of devices: axes `data`, `fsdp` and `tensor`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from moe_jax.config.run import MeshConfig
from moe_jax.errors import DeviceError

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config`, by default over all devices of all processes.

    Raises:
      DeviceError: the number of devices differs from the size of the mesh.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    needed = math.prod(sizes)
    shape = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, sizes, strict=True))
    if needed != len(devices):
        verb = "needs" if needed > len(devices) else "uses only"
        raise DeviceError(
            f"mesh {shape} {verb} {needed} devices, but {len(devices)} ({devices[0].platform}) "
            f"are available; choose axes whose product is {len(devices)}"
        )
    # `make_mesh` orders the devices by their interconnect. Axes are Auto: XLA's partitioner
    # propagates shardings from the parameters and constraints.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=auto, devices=devices)


def platform_of(devices: Sequence[Any] | None = None) -> str:
    """Platform of devices, by default of all: `cpu`, `gpu`, `tpu` or another name of JAX.

    The devices may be absent chips that a program is only compiled for, whose platform may be
    called `cuda`.
    """
    platform = (jax.devices() if devices is None else devices)[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform
