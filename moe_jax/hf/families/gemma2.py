"""Gemma 2: Gemma with norms on both sides of a block, soft caps and alternating windows."""

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
from moe_jax.hf.rope import read_rope

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}

# The checkpoint's `post_attention_layernorm` follows attention, this package's precedes the FFN.
NORMS = (
    norm("input_layernorm"),
    norm("post_attention_layernorm", "post_self_attn_layernorm"),
    norm("pre_feedforward_layernorm", "post_attention_layernorm"),
    norm("post_feedforward_layernorm", "post_mlp_layernorm"),
)
WEIGHTS = (*EMBEDDING, *NORMS, *ATTENTION, *ATTENTION_BIASES, *MLP, *HEAD)
CONSTANTS = {"mlp_bias": False, "use_bidirectional_attention": False}


@model_family(
    "gemma2", "Gemma2ForCausalLM", weights=WEIGHTS, defaults=DEFAULTS, constants=CONSTANTS
)
def read_gemma2(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    layer_types = hf_fields.specified_layer_types(fields)
    layer_types = layer_types or hf_fields.alternating(fields, 2)
    return ModelConfig(
        hidden_act=activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=fields.get("head_dim", int),
        rope=read_rope(fields),
        attention_bias=fields.get("attention_bias", bool),
        mlp_bias=False,
        post_norms=True,
        norm_unit_offset=True,
        scale_embeddings=True,
        query_pre_attn_scalar=fields.get("query_pre_attn_scalar", float),
        attn_logit_softcapping=fields.nullable("attn_logit_softcapping", float),
        final_logit_softcapping=fields.nullable("final_logit_softcapping", float),
        **hf_fields.sliding(fields, fields.nullable("sliding_window", int), layer_types),
        **hf_fields.common(fields),
    )


def activation(fields: HFFields) -> str:
    """`hidden_activation`; `hidden_act`, if it is given too, must be equal."""
    name = hf_fields.activation(fields, "hidden_activation")
    other = fields.optional("hidden_act", str)
    if other not in (None, name):
        raise fields.error("hidden_act", f"{other!r} contradicts hidden_activation {name!r}")
    return name
