"""Llama 1 to 3, and models stored in its format: TinyLlama, Yi, Vicuna, SmolLM, ..."""

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    EMBEDDING,
    HEAD,
    MLP,
    MLP_BIASES,
    PRE_NORMS,
    model_family,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope

# Llama 1 and 2 have no rope_theta, Llama 1 has no num_key_value_heads.
DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

WEIGHTS = (*EMBEDDING, *PRE_NORMS, *ATTENTION, *ATTENTION_BIASES, *MLP, *MLP_BIASES, *HEAD)


@model_family("llama", "LlamaForCausalLM", weights=WEIGHTS, defaults=DEFAULTS)
def read_llama(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.kv_heads_or_heads(fields),
        head_dim=hf_fields.head_dim_or_quotient(fields),
        rope=read_rope(fields),
        attention_bias=fields.get("attention_bias", bool),
        mlp_bias=fields.get("mlp_bias", bool),
        **hf_fields.common(fields),
    )
