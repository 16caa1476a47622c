"""The kernels of the devices that a program is compiled for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.errors import DeviceError

_FIRST_CAPABILITY = (8, 0)
_WIDE_HEADS_CAPABILITY = (9, 0)
_NARROW_HEAD = 128


def require_platform(compute: ComputeConfig, devices: Sequence[Any] | None = None) -> None:
    """Checks that the kernels of attention and experts run on the devices, all by default.

    Raises:
      DeviceError: one needs another platform.
    """
    if compute.attention != "cudnn" and compute.experts != "fused":
        return
    device = (jax.devices() if devices is None else devices)[0]
    capability = _capability(device)
    if compute.experts == "fused" and (capability is None or capability < _FIRST_CAPABILITY):
        found = f"a {device.platform}" if capability is None else f"{device.device_kind}"
        raise DeviceError(
            "config.compute.experts: 'fused' needs an NVIDIA GPU of compute capability 8.0, and "
            f"jax runs on {found}; use 'einsum'"
        )
    if compute.attention == "cudnn" and capability is None:
        raise DeviceError(
            "config.compute.attention: 'cudnn' needs an NVIDIA GPU, and jax runs on a "
            f"{device.platform}; use 'auto' or 'xla'"
        )


def resolve_attention(compute: ComputeConfig, model: ModelConfig, device: Any) -> ComputeConfig:
    """Replaces the attention `auto` by the kernel for this model and device, `cudnn` or `xla`.

    Args:
      compute: settings of the computation.
      model: architecture of the base model.
      device: device of the program; may be abstract.

    Raises:
      DeviceError: the attention is `cudnn`, and the device does not have it for this model.
    """
    reason = _missing(model, device)
    if compute.attention == "cudnn" and reason is not None:
        raise DeviceError(f"config.compute.attention: 'cudnn' {reason}; use 'auto' or 'xla'")
    if compute.attention != "auto":
        return compute
    is_fused = reason is None and compute.fused_attention_limit(model) is None
    return dataclasses.replace(compute, attention="cudnn" if is_fused else "xla")


def _missing(model: ModelConfig, device: Any) -> str | None:
    """Requirement of cuDNN's attention that the device does not meet; None if it meets all."""
    capability = _capability(device)
    if capability is None:
        return f"needs an NVIDIA GPU, and the program is for a {device.platform}"
    first = _FIRST_CAPABILITY if model.widest_head <= _NARROW_HEAD else _WIDE_HEADS_CAPABILITY
    if capability < first:
        needed, found = (".".join(map(str, version)) for version in (first, capability))
        heads = f"heads of {model.widest_head} channels"
        return (
            f"needs compute capability {needed} for {heads}, and {device.device_kind} has {found}"
        )
    return None


def _capability(device: Any) -> tuple[int, ...] | None:
    """Compute capability of an NVIDIA GPU; None for other devices."""
    parts = str(getattr(device, "compute_capability", "")).split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else None
