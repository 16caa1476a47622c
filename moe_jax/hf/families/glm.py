"""GLM-4: interleaved partial RoPE; the 2025 releases (Glm4) also normalize block outputs."""

from typing import Any

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    ATTENTION,
    DOWN,
    EMBEDDING,
    FUSED_GATE_UP,
    HEAD,
    PRE_NORMS,
    Condition,
    model_family,
    norm,
    qkv_biases,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import RopeRules, read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1.5625e-7,
    "rope_theta": 10_000.0,
    "attention_bias": True,
    "tie_word_embeddings": False,
}

ROPE = RopeRules(partial_rotary_factor=0.5, interleaved=True)

GLM_WEIGHTS = (
    *EMBEDDING,
    *PRE_NORMS,
    *ATTENTION,
    *qkv_biases(Condition("qkv_bias", True, "attention_bias")),
    *FUSED_GATE_UP,
    *DOWN,
    *HEAD,
)
GLM4_WEIGHTS = (*GLM_WEIGHTS, norm("post_self_attn_layernorm"), norm("post_mlp_layernorm"))
CONSTANTS = {"mlp_bias": False}


@model_family("glm", "GlmForCausalLM", weights=GLM_WEIGHTS, defaults=DEFAULTS, constants=CONSTANTS)
def read_glm(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(**_common(fields))


@model_family(
    "glm4", "Glm4ForCausalLM", weights=GLM4_WEIGHTS, defaults=DEFAULTS, constants=CONSTANTS
)
def read_glm4(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(post_norms=True, **_common(fields))


def _common(fields: HFFields) -> dict[str, Any]:
    return {
        "hidden_act": hf_fields.activation(fields),
        "num_kv_heads": hf_fields.specified_kv_heads(fields),
        "head_dim": fields.get("head_dim", int),
        "rope": read_rope(fields, ROPE),
        "attention_bias": False,
        "mlp_bias": False,
        "qkv_bias": fields.get("attention_bias", bool),
        **hf_fields.common(fields),
    }
