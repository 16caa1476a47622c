"""Seed-OSS: Llama with biases on query, key and value.

Its files ask for dropout of attention and residuals in training (0.1); as in all families, the
frozen base has none.
"""

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    MLP,
    MLP_BIASES,
    PRE_NORMS,
    Condition,
    model_family,
    projection,
    qkv_biases,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 524_288,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

WITH_OUTPUT = Condition("attention_bias", True, "attention_out_bias")
WEIGHTS = (
    *EMBEDDING,
    *PRE_NORMS,
    *ATTENTION,
    *qkv_biases(Condition("qkv_bias", True, "attention_bias")),
    *qkv_biases(Condition("attention_bias", True, "attention_bias")),
    projection("self_attn.o_proj", "QD", bias=True, condition=WITH_OUTPUT),
    *MLP,
    *MLP_BIASES,
    *HEAD,
)


@model_family("seed_oss", "SeedOssForCausalLM", weights=WEIGHTS, defaults=DEFAULTS)
def read_seed_oss(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    qkv, output = (fields.get(f"attention_{name}", bool) for name in ("bias", "out_bias"))
    if output and not qkv:
        raise fields.error("attention_out_bias", "True is not supported without attention_bias")
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=fields.get("head_dim", int),
        rope=read_rope(fields),
        attention_bias=output,
        qkv_bias=qkv and not output,
        mlp_bias=fields.get("mlp_bias", bool),
        **hf_fields.common(fields),
    )
