"""Compilation for a GPU on a machine without one.

XLA's compiler for NVIDIA GPUs comes with jax's CUDA plugin (`pip install "jax[cuda13]"`). It
compiles on any Linux machine for a chip that a text file describes. Operations, bytes and memory
can be read from the compiled program; only running it needs the chip and its driver. Needs jax, and
`gpu_chip` also the plugin.
"""

import contextlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from moe_jax.config.parse import suggest
from moe_jax.errors import ConfigError

CHIPS = ("h200",)
"""Names of GPUs, each described to the compiler by the file `NAME.txtpb` in this folder."""

_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")

_FLAGS = (
    # Autotuning runs candidates on the chip. Without it each kernel is XLA's first choice.
    "--xla_gpu_autotune_level=0",
    # Triton's products need autotuning, as its first choice is slow. cuBLAS has all products.
    "--xla_gpu_enable_triton_gemm=false",
)
_CUDNN_VERSION = 92000
_COMPUTE_CAPABILITY = (9, 0)


def gpu_chip(name: str) -> Any:
    """Returns one GPU, as a device for the shardings of abstract arrays.

    Call it before any other use of a device: XLA reads its flags once, and other programs run on
    the CPU from then on. Flags in `XLA_FLAGS` take precedence over those set here.

    Args:
      name: one of `CHIPS`.

    Raises:
      ConfigError: the name is unknown, or the CUDA plugin is not installed or fails.
    """
    if name not in CHIPS:
        raise ConfigError(f"--compile-for: no chip is called {name!r}; {suggest(name, CHIPS)}")
    if not plugin_version():
        raise ConfigError("--compile-for: needs jax's CUDA plugin, pip install 'jax[cuda13]'")
    description = Path(__file__).with_name(f"{name}.txtpb").read_text(encoding="utf-8")
    # Of two values for a flag, XLA takes the later one.
    os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
    # Otherwise the plugin looks for a driver.
    jax.config.update("jax_platforms", "cpu")
    try:
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=description, topology="1x1x1"
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--compile-for: {reason}") from error
    _replace_capability_checks()
    return topology.devices[0]


def plugin_version() -> str | None:
    """Package name and version of jax's CUDA plugin, which has the compiler; None without it."""
    for package in _PLUGINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return None


def _replace_capability_checks() -> None:
    """Makes jax's fused attention see the described chip instead of the running one.

    jax checks the version of cuDNN and the compute capability while it traces, and has no setting
    to compile for another machine.
    """
    checks = {
        "check_cudnn_version": lambda: _CUDNN_VERSION,
        "check_compute_capability": _is_at_least,
        "is_cuda_compute_capability_at_least": _is_at_least,  # its name in later versions of jax
    }
    for function, check in checks.items():
        if hasattr(fused_attention_stablehlo, function):
            setattr(fused_attention_stablehlo, function, check)


def _is_at_least(capability: str) -> bool:
    return tuple(map(int, capability.split("."))) <= _COMPUTE_CAPABILITY
