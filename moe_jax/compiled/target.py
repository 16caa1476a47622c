"""Devices to compile for on a machine that has none of them.

XLA's compiler for NVIDIA GPUs comes with jax's CUDA plugin, and that for TPUs with the package
`libtpu`. Both compile on any Linux machine, without a chip and without a driver. What a program
computes and moves and the memory that it takes can be read from it; only running it needs the chip.
"""

import contextlib
import importlib.metadata
import math
import os
from typing import Any

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from moe_jax.compiled.chips import Chip, chip_named
from moe_jax.compiled.gpu_target import CUDNN_VERSION, gpu_target
from moe_jax.errors import ConfigError

_PLUGINS = {"gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "tpu": ("libtpu",)}
"""Packages with the compiler by platform, of which one suffices."""

_EXTRAS = {"gpu": "cuda13", "tpu": "tpu"}
"""Extra of this package that installs the compiler, by platform."""

_XLA_FLAGS = (
    # Autotuning runs candidates on the chip. Without it each kernel is XLA's first choice.
    "--xla_gpu_autotune_level=0",
    # Triton's products need autotuning, as its first choice is slow. cuBLAS has all products.
    "--xla_gpu_enable_triton_gemm=false",
)

_TORUS_AXES = {"v5p": 3, "v6e": 2}
"""Axes of the torus of a TPU slice."""

_CHIPS_OF_HOST = 4


def target_devices(name: str, count: int = 1) -> list[Any]:
    """Devices of absent chips, for the mesh of a program that is only compiled.

    Call it before any other use of a device: XLA reads its flags once, and other programs run on
    the CPU from then on. Flags in `XLA_FLAGS` take precedence over those set here.

    Args:
      name: one of `moe_jax.compiled.chips.CHIPS`.
      count: number of chips of one host, which see one another.

    Raises:
      ConfigError: the name is unknown, the compiler for its platform is not installed or fails, or
        it does not know this number of chips.
    """
    chip = chip_named(name)
    if not compiler_version(chip.platform):
        needed, extra = _PLUGINS[chip.platform][0], _EXTRAS[chip.platform]
        raise ConfigError(
            f"--compile-for {name}: needs {needed}; pip install 'moe-jax[{extra}]', or "
            f"'jax[{extra}]'"
        )
    # Otherwise a plugin looks for a driver or for local chips.
    jax.config.update("jax_platforms", "cpu")
    # A program of an absent chip can be written to the cache but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    topology = _gpus if chip.platform == "gpu" else _tpus
    try:
        return list(topology(name, chip, count).devices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--compile-for {name}: {count} of them: {reason}") from error


def compiler_version(platform: str) -> str | None:
    """Package and version of the compiler for a platform; None where it is not installed."""
    for package in _PLUGINS[platform]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return None


def _gpus(name: str, chip: Chip, count: int) -> Any:
    # Of two values for a flag, XLA takes the later one.
    os.environ["XLA_FLAGS"] = " ".join([*_XLA_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
    topology = topologies.get_topology_desc(
        "",
        platform="cuda",
        target_config=gpu_target(chip),
        topology=f"1x1x{count}",  # slices, hosts of a slice, GPUs of a host
    )
    _replace_capability_checks(chip)
    return topology


def _tpus(name: str, chip: Chip, count: int) -> Any:
    # libtpu queries a server that exists only in Google's cloud, asks for the names of hosts, and
    # takes a lock that excludes other processes.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{name}-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    shape = _slice_shape(count, _TORUS_AXES[name])
    # A slice of a part of a host has to be named; larger slices have whole hosts.
    part = {"chips_per_host_bounds": (*shape, 1, 1)[:3]} if count < _CHIPS_OF_HOST else {}
    return topologies.get_topology_desc(f"{name}:{'x'.join(map(str, shape))}", "tpu", **part)


def _slice_shape(count: int, axes: int) -> tuple[int, ...]:
    """Chips along each axis of a TPU slice, of which the longest is at most twice the shortest.

    Raises:
      ValueError: slices have powers of two chips.
    """
    if count & (count - 1):
        raise ValueError(f"a slice has 1, 2, 4, 8, ... chips, not {count}")
    shape = [1] * axes
    while math.prod(shape) < count:
        shape[shape.index(min(shape))] *= 2
    return tuple(sorted(shape) if min(shape) > 1 else shape)


def _replace_capability_checks(chip: Chip) -> None:
    """Makes jax's fused attention see the described chip instead of the running one.

    jax checks the version of cuDNN and the compute capability while it traces, and has no setting
    to compile for another machine.
    """
    assert chip.gpu is not None
    capability = chip.gpu.capability
    major, minor, patch = CUDNN_VERSION

    def is_at_least(asked: str) -> bool:
        return tuple(map(int, asked.split("."))) <= capability

    checks = {
        "check_cudnn_version": lambda: 10000 * major + 100 * minor + patch,
        "check_compute_capability": is_at_least,
        "is_cuda_compute_capability_at_least": is_at_least,  # its name in later versions of jax
    }
    for function, check in checks.items():
        if hasattr(fused_attention_stablehlo, function):
            setattr(fused_attention_stablehlo, function, check)
