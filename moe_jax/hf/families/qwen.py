"""Qwen2 and Qwen2.5 (biases on query, key and value), and Qwen3 (normalized queries and keys)."""

from typing import Any

from moe_jax.config.model import LayerType, ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    EMBEDDING,
    HEAD,
    MLP,
    PRE_NORMS,
    QK_NORMS,
    model_family,
    qkv_biases,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

QWEN2_WEIGHTS = (*EMBEDDING, *PRE_NORMS, *ATTENTION, *qkv_biases(), *MLP, *HEAD)
QWEN3_WEIGHTS = (*EMBEDDING, *PRE_NORMS, *ATTENTION, *ATTENTION_BIASES, *QK_NORMS, *MLP, *HEAD)


@model_family(
    "qwen2",
    "Qwen2ForCausalLM",
    weights=QWEN2_WEIGHTS,
    defaults=DEFAULTS,
    constants={"attention_bias": True, "mlp_bias": False, "use_mrope": False},
)
def read_qwen2(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(
        head_dim=hf_fields.head_dim_or_quotient(fields),
        attention_bias=False,
        qkv_bias=True,
        **_common(fields),
    )


@model_family(
    "qwen3",
    "Qwen3ForCausalLM",
    weights=QWEN3_WEIGHTS,
    defaults=DEFAULTS | {"attention_bias": False},
    constants={"mlp_bias": False},
)
def read_qwen3(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(
        head_dim=fields.get("head_dim", int),
        attention_bias=fields.get("attention_bias", bool),
        qk_norm=True,
        **_common(fields),
    )


def _common(fields: HFFields) -> dict[str, Any]:
    return {
        "hidden_act": hf_fields.activation(fields),
        "num_kv_heads": hf_fields.specified_kv_heads(fields),
        "rope": read_rope(fields),
        "mlp_bias": False,
        **_sliding(fields),
        **hf_fields.common(fields),
    }


def _sliding(fields: HFFields) -> dict[str, Any]:
    """Sliding windows: off by default; if on, by default in the layers from `max_window_layers`."""
    window = None
    if fields.get("use_sliding_window", bool):
        window = fields.nullable("sliding_window", int)
    layer_types = hf_fields.specified_layer_types(fields)
    if layer_types is not None:
        if window is None and "sliding_attention" in layer_types:
            raise fields.error(
                "layer_types", "has sliding layers, but use_sliding_window or sliding_window is off"
            )
        return hf_fields.sliding(fields, window, layer_types)
    first = fields.get("max_window_layers", int)
    types: list[LayerType] = [
        "sliding_attention" if window is not None and layer >= first else "full_attention"
        for layer in range(fields.get("num_hidden_layers", int))
    ]
    return hf_fields.sliding(fields, window, types)
