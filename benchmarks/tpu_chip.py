"""A TPU chip to compile for on a machine that has none.

XLA's compiler for TPUs comes with the package `libtpu` (`pip install "jax[tpu]"`), which compiles
on any Linux machine: what a program computes and how much memory it takes can be read from it
there, and only running it needs the chip. Needs jax and, when asked for a chip, `libtpu`.
"""

import importlib.util
import os
from typing import Any

import jax

from moe_jax.errors import ConfigError

GENERATIONS = {"v6e": 32, "v5p": 95}
"""GiB of memory of a chip, by generation; a program that needs more is not compiled."""


def tpu_chip(generation: str) -> Any:
    """One chip, as a device to lay abstract arrays out on.

    Call it before anything else asks jax for a device: what is not compiled for the chip is left to
    the CPU from here on.

    Args:
      generation: one of `GENERATIONS`.

    Raises:
      ConfigError: `libtpu` is not installed, or cannot be used.
    """
    # libtpu would look for the machine's own chips, at a server that answers in Google's cloud only
    # and with a lock that keeps a second process out.
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
