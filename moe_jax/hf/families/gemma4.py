"""Gemma 4, dense, text only: full attention with wider heads and values made of keys.

Checkpoints with embeddings of each layer (`hidden_size_per_layer_input`), keys and values shared
between layers (`num_kv_shared_layers`), or experts are refused.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.config.attention import GlobalAttentionConfig
from moe_jax.config.model import LayerType, ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families import gemma2
from moe_jax.hf.families.family import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    LAYER,
    MLP,
    QK_NORMS,
    Condition,
    WeightRule,
    model_family,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import RopeRules, rope_of_section

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "attention_k_eq_v": False,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "hidden_size_per_layer_input": 256,
}
ROPES = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
ROPE = RopeRules(partial_rotary_factor=1.0, types=("default", "proportional"))


def _global(name: str, axes: str, **options: Any) -> WeightRule:
    """Row for a kernel or a norm of layers with full attention, stored as those of the others."""
    key = f"{LAYER}self_attn.{name}.weight"
    leaf = "scale" if name.endswith("norm") else "kernel"
    return WeightRule(key, f"layers/global_attn/{name}/{leaf}", axes, leaf == "kernel", **options)


GLOBAL_ATTENTION = (
    _global("q_proj", "DA"),
    _global("k_proj", "DB"),
    _global("v_proj", "DB", condition=Condition("global_key_as_value", False, "attention_k_eq_v")),
    _global("o_proj", "AD"),
    _global("q_norm", "X"),
    _global("k_norm", "X"),
)
SCALE = WeightRule(f"{LAYER}layer_scalar", "layers/layer_scalar", "1")


@model_family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    weights=(
        *EMBEDDING,
        *gemma2.NORMS,
        *ATTENTION,
        *QK_NORMS,
        *GLOBAL_ATTENTION,
        *MLP,
        SCALE,
        *HEAD,
    ),
    defaults=DEFAULTS,
    constants={
        "attention_bias": False,
        "mlp_bias": False,
        "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
    },
)
def read_gemma4(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    if fields.get("hidden_size_per_layer_input", int):  # also where the file leaves it out
        raise fields.error(
            "hidden_size_per_layer_input",
            "only 0 is supported; give a model without embeddings of each layer",
        )
    layer_types = hf_fields.specified_layer_types(fields) or hf_fields.alternating(fields, 6)
    layer_types = (*layer_types[:-1], "full_attention")  # as transformers has it, whatever is named
    if set(layer_types) != {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", "must name both full and sliding attention")
    ropes = _ropes(fields)
    return ModelConfig(
        hidden_act=gemma2.activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=fields.get("head_dim", int),
        attention_bias=False,
        mlp_bias=False,
        qk_norm=True,
        post_norms=True,
        scale_embeddings=True,
        query_pre_attn_scalar=1.0,
        value_norm=True,
        layer_scale=True,
        final_logit_softcapping=fields.nullable("final_logit_softcapping", float),
        global_attention=_global_attention(fields, layer_types),
        rope=ropes["full_attention"],
        sliding_rope=ropes["sliding_attention"],
        **hf_fields.sliding(fields, fields.nullable("sliding_window", int), layer_types),
        **hf_fields.common(fields),
    )


def _ropes(fields: HFFields) -> dict[str, Any]:
    """Rotary embedding of each type of layer."""
    nested = fields.group("rope_parameters") or ROPES
    for name, section in nested.items():
        if name not in ROPES or not isinstance(section, Mapping):
            raise fields.error(
                f"rope_parameters.{name}",
                f"expected one group of fields for each of {', '.join(ROPES)}",
            )
    groups = HFFields(nested, f"{fields.where}: rope_parameters", {})
    return {
        name: rope_of_section(fields, f"rope_parameters.{name}", groups.group(name), ROPE)
        for name in ROPES
    }


def _global_attention(
    fields: HFFields, layer_types: tuple[LayerType, ...] | list[LayerType]
) -> GlobalAttentionConfig:
    """Sizes of the layers with full attention: of all together, or as overrides of each."""
    key_as_value = fields.get("attention_k_eq_v", bool)
    kv_heads = fields.get("num_key_value_heads", int)
    if key_as_value:
        kv_heads = fields.optional("num_global_key_value_heads", int) or kv_heads
    head_dim = fields.optional("global_head_dim", int) or 512
    overrides = fields.group("per_layer_config")
    if overrides:
        layers = {str(layer) for layer, kind in enumerate(layer_types) if kind == "full_attention"}
        first, *others = overrides.values()
        if set(map(str, overrides)) != layers or any(group != first for group in others):
            raise fields.error(
                "per_layer_config", "must have the same sizes for each layer with full attention"
            )
        groups = HFFields(overrides, f"{fields.where}: per_layer_config", {})
        sizes = HFFields(groups.group(next(iter(overrides))), groups.where, {})
        if unknown := set(sizes.mapping) - {"head_dim", "num_key_value_heads"}:
            raise fields.error("per_layer_config", f"{min(unknown)} is not supported")
        head_dim = sizes.get("head_dim", int)
        kv_heads = sizes.optional("num_key_value_heads", int) or kv_heads
    return GlobalAttentionConfig(
        num_kv_heads=kv_heads, head_dim=head_dim, key_as_value=key_as_value
    )
