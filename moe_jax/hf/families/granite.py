"""Granite 3 and dense Granite 4: Llama with factors of embeddings, scores, residuals and logits.

Granite 4 has one class for all its models (`granitemoehybrid`). Those without Mamba layers and
experts are dense: Granite 4.0 Micro, 1B and 350M. Their FFN is the class's shared expert.
"""

from typing import Any

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families import llama
from moe_jax.hf.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    EMBEDDING,
    HEAD,
    LAYER,
    PRE_NORMS,
    WeightRule,
    fused_projections,
    model_family,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}

GATE_UP = {"gate_proj": "DF", "up_proj": "DF"}
GRANITE4_WEIGHTS = (
    *EMBEDDING,
    *PRE_NORMS,
    *ATTENTION,
    *ATTENTION_BIASES,
    *fused_projections("shared_mlp.input_linear", GATE_UP, block="mlp"),
    WeightRule(
        f"{LAYER}shared_mlp.output_linear.weight", "layers/mlp/down_proj/kernel", "FD", True
    ),
    *HEAD,
)


@model_family(
    "granite",
    "GraniteForCausalLM",
    weights=llama.WEIGHTS,
    defaults=DEFAULTS | {"mlp_bias": False},
)
def read_granite(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(**_common(fields) | {"mlp_bias": fields.get("mlp_bias", bool)})


@model_family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    weights=GRANITE4_WEIGHTS,
    defaults=DEFAULTS | {"num_local_experts": 8, "position_embedding_type": None},
    constants={"mlp_bias": False},
)
def read_granite4(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    experts, layers = fields.get("num_local_experts", int), fields.get("num_hidden_layers", int)
    if experts:
        raise fields.error("num_local_experts", f"{experts} is not supported; only 0, dense models")
    layer_types = fields.get("layer_types", tuple[str, ...])
    other = sorted(set(layer_types) - {"attention", "full_attention"})
    if other or len(layer_types) != layers:
        reason = f"{other[0]!r} is not supported" if other else f"must name {layers} layers"
        raise fields.error("layer_types", f"{reason}; all layers must be 'full_attention'")
    positions = fields.nullable("position_embedding_type", str)
    if positions not in ("rope", "nope", None):
        raise fields.error("position_embedding_type", f"{positions!r} is not supported")
    return ModelConfig(
        rotated_layers=None if positions == "rope" else (False,) * layers,
        **_common(fields) | {"intermediate_size": fields.get("shared_intermediate_size", int)},
    )


def _common(fields: HFFields) -> dict[str, Any]:
    divisor = hf_fields.factor(fields, "logits_scaling")
    return {
        "hidden_act": hf_fields.activation(fields),
        "num_kv_heads": hf_fields.kv_heads_or_heads(fields),
        "head_dim": hf_fields.head_dim_or_quotient(fields),
        "rope": read_rope(fields),
        "attention_bias": fields.get("attention_bias", bool),
        "mlp_bias": False,
        "embedding_multiplier": hf_fields.factor(fields, "embedding_multiplier"),
        "query_pre_attn_scalar": (hf_fields.factor(fields, "attention_multiplier") or 1.0) ** -2,
        "residual_multiplier": hf_fields.factor(fields, "residual_multiplier"),
        "logit_scale": None if divisor is None else 1 / divisor,
        **hf_fields.common(fields),
    }
