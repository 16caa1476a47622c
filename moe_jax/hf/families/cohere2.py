"""Cohere 2 (Command R7B, Command A): parallel blocks, layer norms, rotation in windows only."""

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    EMBEDDING,
    HEAD,
    MLP,
    model_family,
    norm,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import RopeRules, read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
}
PERIOD = 4
"""Every fourth layer has full attention where `sliding_window_pattern` is not given."""

ROPE = RopeRules(interleaved=True)
WEIGHTS = (
    *EMBEDDING,
    norm("input_layernorm"),
    *ATTENTION,
    *ATTENTION_BIASES,
    *MLP,
    *HEAD,
)


@model_family(
    "cohere2",
    "Cohere2ForCausalLM",
    weights=WEIGHTS,
    defaults=DEFAULTS,
    constants={
        "mlp_bias": False,
        "rotary_pct": 1,
        "use_gated_activation": True,
        "use_parallel_block": True,
    },
)
def read_cohere2(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    period = fields.optional("sliding_window_pattern", int)
    layer_types = hf_fields.specified_layer_types(fields)
    if layer_types is None:
        layer_types = hf_fields.alternating(fields, PERIOD if period is None else period)
    rotated = tuple(kind == "sliding_attention" for kind in layer_types)
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.kv_heads_or_heads(fields),
        head_dim=hf_fields.head_dim_or_quotient(fields),
        rope=read_rope(fields, ROPE),
        rotated_layers=None if all(rotated) else rotated,
        attention_bias=fields.get("attention_bias", bool),
        mlp_bias=False,
        parallel_block=True,
        norm_centered=True,
        logit_scale=hf_fields.factor(fields, "logit_scale"),
        **hf_fields.sliding(fields, fields.nullable("sliding_window", int), layer_types),
        **hf_fields.common(fields, norm_eps="layer_norm_eps"),
    )
