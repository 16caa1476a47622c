"""Gemma 4, dense, text only: full attention with wider heads, and values made of keys (31B).

In E2B and E4B each layer has embeddings of the tokens, and later layers attend to keys and values
of earlier ones, in E2B with wider FFNs. Checkpoints with experts (26B-A4B) are refused.
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
    MODEL,
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
    "vocab_size_per_layer_input": 262_144,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
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

READS = Condition("has_readers", True, "num_kv_shared_layers")
WIDE = Condition("has_wide_ffn", True, "use_double_wide_mlp")
EMBEDS = Condition("has_layer_embeddings", True, "hidden_size_per_layer_input")
KEYS_ARE_NOT_VALUES = Condition("global_key_as_value", False, "attention_k_eq_v")


def _row(
    name: str, module: str, axes: str, condition: Condition | None = None, block: str = ""
) -> WeightRule:
    """Row for a kernel or a norm of a layer.

    Args:
      name: name of the tensor's module, for example `self_attn.q_proj`.
      module: module of the layer that has the leaf.
      axes: see `WeightRule`.
      condition: see `WeightRule`.
      block: name of the leaf's own module, if it is not that of the tensor.
    """
    leaf = "scale" if name.endswith("norm") else "kernel"
    path = f"layers/{module}/{block or name.rpartition('.')[2]}/{leaf}"
    return WeightRule(f"{LAYER}{name}.weight", path, axes, leaf == "kernel", condition=condition)


GLOBAL_ATTENTION = (
    _row("self_attn.q_proj", "global_attn", "DA"),
    _row("self_attn.k_proj", "global_attn", "DB"),
    _row("self_attn.v_proj", "global_attn", "DB", KEYS_ARE_NOT_VALUES),
    _row("self_attn.o_proj", "global_attn", "AD"),
    _row("self_attn.q_norm", "global_attn", "X"),
    _row("self_attn.k_norm", "global_attn", "X"),
)
READERS = (
    _row("self_attn.q_proj", "self_attn_reader", "DQ", READS),
    _row("self_attn.o_proj", "self_attn_reader", "QD", READS),
    _row("self_attn.q_norm", "self_attn_reader", "W", READS),
    _row("self_attn.q_proj", "global_attn_reader", "DA", READS),
    _row("self_attn.o_proj", "global_attn_reader", "AD", READS),
    _row("self_attn.q_norm", "global_attn_reader", "X", READS),
)
WIDE_MLP = (
    _row("mlp.gate_proj", "wide_mlp", "DU", WIDE),
    _row("mlp.up_proj", "wide_mlp", "DU", WIDE),
    _row("mlp.down_proj", "wide_mlp", "UD", WIDE),
)
SCALE = WeightRule(f"{LAYER}layer_scalar", "layers/layer_scalar", "1")


def _table(name: str, leaf: str, axes: str, transposed: bool = False) -> WeightRule:
    """Row for a leaf of the embeddings of all layers."""
    path = f"layer_embeddings/{leaf}"
    return WeightRule(f"{MODEL}{name}.weight", path, axes, transposed, condition=EMBEDS)


LAYER_EMBEDDINGS = (
    _table("embed_tokens_per_layer", "embed_tokens/embedding", "VL"),
    _table("per_layer_model_projection", "projection", "DL", True),
    _table("per_layer_projection_norm", "norm/scale", "P"),
    _row("per_layer_input_gate", "layer_embedding", "DP", EMBEDS),
    _row("per_layer_projection", "layer_embedding", "PD", EMBEDS),
    _row("post_per_layer_input_norm", "layer_embedding", "D", EMBEDS, "norm"),
)


@model_family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    weights=(
        *EMBEDDING,
        *gemma2.NORMS,
        *ATTENTION,
        *QK_NORMS,
        *GLOBAL_ATTENTION,
        *READERS,
        *MLP,
        *WIDE_MLP,
        *LAYER_EMBEDDINGS,
        SCALE,
        *HEAD,
    ),
    defaults=DEFAULTS,
    constants={
        "attention_bias": False,
        "mlp_bias": False,
        "use_bidirectional_attention": "vision",
        "enable_moe_block": False,
    },
)
def read_gemma4(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
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
        **_readers(fields),
        layer_embedding_width=_layer_embedding_width(fields),
        **hf_fields.common(fields),
    )


def _readers(fields: HFFields) -> dict[str, int | None]:
    """Layers that attend to keys and values of earlier ones, and the width of their FFN."""
    number, wide = fields.get("num_kv_shared_layers", int), fields.get("use_double_wide_mlp", bool)
    width = 2 * fields.get("intermediate_size", int) if wide and number else None
    return {"num_reader_layers": number, "reader_ffn_width": width}


def _layer_embedding_width(fields: HFFields) -> int | None:
    """Width of a layer's embedding; a file without the field has 256, as in transformers."""
    width = fields.get("hidden_size_per_layer_input", int) or None
    rows, vocabulary = (
        fields.get(key, int) for key in ("vocab_size_per_layer_input", "vocab_size")
    )
    if width is not None and rows != vocabulary:
        raise fields.error(
            "vocab_size_per_layer_input", f"{rows} is not vocab_size ({vocabulary}), as it must be"
        )
    return width


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
