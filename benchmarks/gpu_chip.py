"""A GPU to compile for on a machine that has none.

XLA's compiler for NVIDIA GPUs comes with jax's CUDA plugin (`pip install "jax[cuda13]"`). It
compiles on any Linux machine for a chip that a text file describes: what a program computes, moves
and holds can be read from it there, and only running it needs the chip and its driver. Needs jax
and, when asked for a chip, the plugin.
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
"""Names of GPUs; the file `NAME.txtpb` beside this one describes each to the compiler."""

_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")

_FLAGS = (
    # Autotuning runs candidates on the chip. Without it each kernel is XLA's first choice.
    "--xla_gpu_autotune_level=0",
    # Triton's products are chosen by autotuning; its first choice is slow. cuBLAS has them all.
    "--xla_gpu_enable_triton_gemm=false",
)
_CUDNN_VERSION = 92000
_COMPUTE_CAPABILITY = (9, 0)


def gpu_chip(name: str) -> Any:
    """One GPU, as a device to lay abstract arrays out on.

    Call it before anything else asks jax for a device. XLA reads its flags once, and what is not
    compiled for the chip is left to the CPU from here on. Flags that `XLA_FLAGS` holds already
    take precedence over those set here.

    Args:
      name: one of `CHIPS`.

    Raises:
      ConfigError: there is no such chip, or the CUDA plugin is not installed or cannot be used.
    """
    if name not in CHIPS:
        raise ConfigError(f"--compile-for: no chip is called {name!r}; {suggest(name, CHIPS)}")
    if not plugin_version():
        raise ConfigError("--compile-for: needs jax's CUDA plugin, pip install 'jax[cuda13]'")
    description = Path(__file__).with_name(f"{name}.txtpb").read_text(encoding="utf-8")
    # Of two values for a flag, XLA takes the later one.
    os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
    # The plugin would look for a driver otherwise.
    jax.config.update("jax_platforms", "cpu")
    try:
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=description, topology="1x1x1"
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--compile-for: {reason}") from error
    _answer_for_the_chip()
    return topology.devices[0]


def plugin_version() -> str | None:
    """The package of jax's CUDA plugin and its version, which is that of the compiler."""
    for package in _PLUGINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return None


def _answer_for_the_chip() -> None:
    """Answers what jax's fused attention asks the running GPU for, as the described one would.

    jax checks the version of cuDNN and the compute capability while it traces, and has no setting
    for a program that is compiled for another machine.
    """
    answers = {
        "check_cudnn_version": lambda: _CUDNN_VERSION,
        "check_compute_capability": _is_at_least,
        "is_cuda_compute_capability_at_least": _is_at_least,  # its name in later versions of jax
    }
    for function, answer in answers.items():
        if hasattr(fused_attention_stablehlo, function):
            setattr(fused_attention_stablehlo, function, answer)


def _is_at_least(capability: str) -> bool:
    return tuple(map(int, capability.split("."))) <= _COMPUTE_CAPABILITY
