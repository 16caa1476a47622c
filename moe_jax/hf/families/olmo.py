"""OLMo 2 (norms after attention and FFN, of whole queries and keys), and OLMo 3 (with windows)."""

from typing import Any

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families import gemma3
from moe_jax.hf.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    EMBEDDING,
    HEAD,
    MLP,
    OUTPUT_NORMS,
    model_family,
    norm,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
OLMO3_DEFAULTS = DEFAULTS | {"rope_theta": 500_000.0, "sliding_window": 4096}
CONSTANTS = {"mlp_bias": False, "clip_qkv": None}
PERIOD = 4
"""Every fourth layer of OLMo 3 has full attention."""

WEIGHTS = (
    *EMBEDDING,
    *OUTPUT_NORMS,
    *ATTENTION,
    *ATTENTION_BIASES,
    norm("self_attn.q_norm", axes="Q"),
    norm("self_attn.k_norm", axes="K"),
    *MLP,
    *HEAD,
)


@model_family("olmo2", "Olmo2ForCausalLM", weights=WEIGHTS, defaults=DEFAULTS, constants=CONSTANTS)
def read_olmo2(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(rope=read_rope(fields), **_common(fields))


@model_family(
    "olmo3", "Olmo3ForCausalLM", weights=WEIGHTS, defaults=OLMO3_DEFAULTS, constants=CONSTANTS
)
def read_olmo3(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    layer_types = hf_fields.specified_layer_types(fields)
    layer_types = layer_types or hf_fields.alternating(fields, PERIOD)
    return ModelConfig(
        **gemma3.ropes(fields, layer_types, sliding_theta="rope_theta"),
        **hf_fields.sliding(fields, fields.nullable("sliding_window", int), layer_types),
        **_common(fields),
    )


def _common(fields: HFFields) -> dict[str, Any]:
    return {
        "hidden_act": hf_fields.activation(fields),
        "num_kv_heads": hf_fields.kv_heads_or_heads(fields),
        "head_dim": hf_fields.head_dim_or_quotient(fields),
        "attention_bias": fields.get("attention_bias", bool),
        "mlp_bias": False,
        "qk_norm": True,
        "qk_norm_of": "projection",
        "pre_norms": False,
        "post_norms": True,
        **hf_fields.common(fields),
    }
