"""Qwen3.5 and 3.6, dense, text only: Gated DeltaNet in three of four layers, gated attention."""

from moe_jax.config.attention import DeltaNetConfig
from moe_jax.config.model import LayerType, ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    EMBEDDING,
    HEAD,
    LAYER,
    MLP,
    OUTPUT,
    PRE_NORMS,
    QK_NORMS,
    WeightRule,
    model_family,
    norm,
    projection,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import RopeRules, read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

# Text has the same position in all three axes of the multimodal rotary embedding.
ROPE = RopeRules(
    partial_rotary_factor=0.25,
    types=("default",),
    ignored=("mrope_section", "mrope_interleaved"),
)

ATTENTION = (
    projection("self_attn.q_proj", "DG"),
    projection("self_attn.k_proj", "DK"),
    projection("self_attn.v_proj", "DK"),
    *OUTPUT,
)


def _leaf(name: str, leaf: str, axes: str) -> WeightRule:
    return WeightRule(f"{LAYER}linear_attn.{name}", f"layers/linear_attn/{leaf}", axes)


DELTA_NET = (
    projection("linear_attn.in_proj_qkv", "DC"),
    projection("linear_attn.in_proj_z", "DZ"),
    projection("linear_attn.in_proj_b", "DH"),
    projection("linear_attn.in_proj_a", "DH"),
    _leaf("conv1d.weight", "filters", "C1T"),
    _leaf("A_log", "A_log", "H"),
    _leaf("dt_bias", "dt_bias", "H"),
    norm("linear_attn.norm", axes="Y"),
    projection("linear_attn.out_proj", "ZD"),
)


@model_family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    weights=(*EMBEDDING, *PRE_NORMS, *ATTENTION, *QK_NORMS, *DELTA_NET, *MLP, *HEAD),
    defaults=DEFAULTS,
    constants={"attention_bias": False, "attn_output_gate": True, "mlp_bias": False},
)
def read_qwen3_5(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=fields.get("head_dim", int),
        rope=read_rope(fields, ROPE),
        attention_bias=False,
        mlp_bias=False,
        qk_norm=True,
        norm_unit_offset=True,
        attention_gate=True,
        layer_types=_layer_types(fields),
        delta_net=_delta_net(fields),
        **hf_fields.common(fields),
    )


def _layer_types(fields: HFFields) -> tuple[LayerType, ...]:
    """`layer_types`; by default the last of `full_attention_interval` layers has full attention."""
    interval = fields.optional("full_attention_interval", int)
    interval = 4 if interval is None else interval
    known: tuple[LayerType, ...] = ("full_attention", "linear_attention")
    if interval < 1:
        raise fields.error("full_attention_interval", "must be positive")
    by_interval: tuple[LayerType, ...] = tuple(
        "linear_attention" if (layer + 1) % interval else "full_attention"
        for layer in range(fields.get("num_hidden_layers", int))
    )
    return hf_fields.specified_layer_types(fields, known) or by_interval


def _delta_net(fields: HFFields) -> DeltaNetConfig:
    return DeltaNetConfig(
        num_key_heads=fields.get("linear_num_key_heads", int),
        num_value_heads=fields.get("linear_num_value_heads", int),
        key_head_dim=fields.get("linear_key_head_dim", int),
        value_head_dim=fields.get("linear_value_head_dim", int),
        filter_width=fields.get("linear_conv_kernel_dim", int),
    )
