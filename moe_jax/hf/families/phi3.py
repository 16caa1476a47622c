"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: fused projections, partial RoPE and LongRoPE."""

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    DOWN,
    EMBEDDING,
    FUSED_GATE_UP,
    FUSED_QKV,
    HEAD,
    OUTPUT,
    PRE_NORMS,
    model_family,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import RopeRules, read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
}

WEIGHTS = (*EMBEDDING, *PRE_NORMS, *FUSED_QKV, *OUTPUT, *FUSED_GATE_UP, *DOWN, *HEAD)

# Files of the first releases use other names for LongRoPE.
ROPE = RopeRules(
    partial_rotary_factor=1.0,
    types=("default", "longrope"),
    renamed={"su": "longrope", "yarn": "longrope"},
)


@model_family(
    "phi3",
    "Phi3ForCausalLM",
    weights=WEIGHTS,
    defaults=DEFAULTS,
    constants={"attention_bias": False, "mlp_bias": False, "layer_types": None},
)
def read_phi3(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.kv_heads_or_heads(fields),
        head_dim=hf_fields.head_dim_or_quotient(fields),
        rope=read_rope(fields, ROPE),
        attention_bias=False,
        mlp_bias=False,
        **hf_fields.sliding_everywhere(fields),
        **hf_fields.common(fields),
    )
