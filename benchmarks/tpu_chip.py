"""Compilation for a TPU chip on a machine without one.

XLA's compiler for TPUs comes with the package `libtpu` (`pip install "jax[tpu]"`), which compiles
on any Linux machine. Operations and memory can be read from the compiled program; only running it
needs the chip. Needs jax, and `tpu_chip` also `libtpu`.
"""

import importlib.util
import os
from typing import Any

import jax

from moe_jax.errors import ConfigError

GENERATIONS = {"v6e": 32, "v5p": 95}
"""Memory of a chip in GiB by generation; larger programs fail to compile."""


def tpu_chip(generation: str) -> Any:
    """Returns one chip, as a device for the shardings of abstract arrays.

    Call it before any other use of a device: other programs run on the CPU from then on.

    Args:
      generation: one of `GENERATIONS`.

    Raises:
      ConfigError: `libtpu` is not installed or fails.
    """
    # Otherwise libtpu looks for local chips: it queries a server that exists only in Google's
    # cloud, and takes a lock that excludes other processes.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental import topologies

    name = f"{generation}:1x1x1"
    try:
        topology = topologies.get_topology_desc(
            name, platform="tpu", chips_per_host_bounds=(1, 1, 1)
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if importlib.util.find_spec("libtpu") is None:
            reason = f"needs the package libtpu, pip install 'jax[tpu]' ({reason})"
        raise ConfigError(f"--compile-for: {reason}") from error
    return topology.devices[0]
