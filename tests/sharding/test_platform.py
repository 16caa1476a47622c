"""The attention kernel that a program takes for its model and devices."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
import tiny_program

from moe_jax.config.model import ComputeConfig
from moe_jax.errors import DeviceError
from moe_jax.models.adapted import CompiledLlama
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.platform import resolve_attention

CPU = jax.devices("cpu")[0]


def _gpu(capability):
    return SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=capability)


HOPPER, AMPERE, VOLTA, AMD = map(_gpu, ("9.0", "8.0", "7.0", "gfx942"))


@pytest.mark.parametrize(
    ("device", "dtype", "change", "kernel"),
    [
        (HOPPER, "bfloat16", {}, "cudnn"),
        (_gpu("10.3"), "float16", {}, "cudnn"),
        (AMPERE, "bfloat16", {"head_dim": 128}, "cudnn"),
        (HOPPER, "bfloat16", {"head_dim": 256}, "cudnn"),
        (AMPERE, "bfloat16", {"head_dim": 256}, "xla"),
        (HOPPER, "bfloat16", {"head_dim": 264}, "xla"),
        (HOPPER, "bfloat16", {"head_dim": 12}, "xla"),
        (HOPPER, "float32", {}, "xla"),
        (HOPPER, "bfloat16", {"attn_logit_softcapping": 50.0}, "xla"),
        (HOPPER, "bfloat16", {"final_logit_softcapping": 30.0}, "cudnn"),
        (VOLTA, "float16", {}, "xla"),
        (AMD, "bfloat16", {}, "xla"),
        (CPU, "bfloat16", {}, "xla"),
    ],
)
def test_auto_is_the_fused_kernel_where_it_can_be(device, dtype, change, kernel):
    model = tiny_program.model_config(**{"head_dim": 8} | change)
    resolved = resolve_attention(ComputeConfig(dtype=dtype), model, device)
    assert resolved == ComputeConfig(dtype=dtype, attention=kernel)
    plain = ComputeConfig(dtype=dtype, attention="xla")
    assert resolve_attention(plain, model, device) == plain


@pytest.mark.parametrize(
    ("device", "width", "reason"),
    [
        (CPU, 8, "'cudnn' needs an NVIDIA GPU, and the program is for a cpu"),
        (AMD, 8, "'cudnn' needs an NVIDIA GPU, and the program is for a gpu"),
        (AMPERE, 256, "'cudnn' needs compute capability 9.0 for heads of 256 channels, and a GPU"),
        (VOLTA, 8, "'cudnn' needs compute capability 8.0 for heads of 8 channels, and a GPU"),
    ],
)
def test_the_fused_kernel_is_refused_by_name(device, width, reason):
    compute = ComputeConfig(dtype="bfloat16", attention="cudnn")
    with pytest.raises(DeviceError) as error:
        resolve_attention(compute, tiny_program.model_config(head_dim=width), device)
    assert str(error.value).startswith(f"config.compute.attention: {reason}")
    assert str(error.value).endswith("; use 'auto' or 'xla'")


def test_every_compiled_model_has_a_kernel():
    compute = ComputeConfig(dtype="bfloat16")
    llama = CompiledLlama(LlamaForCausalLM(tiny_program.model_config(), compute))
    assert llama.model.compute == dataclasses.replace(compute, attention="xla")
