"""Gemma 3, text only: Gemma 2 without caps, with normalized queries and keys and two RoPEs."""

from collections.abc import Mapping
from typing import Any

from moe_jax.config.model import LayerType, ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families import gemma2
from moe_jax.hf.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    EMBEDDING,
    HEAD,
    MLP,
    QK_NORMS,
    model_family,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import WHOLE_HEADS, rope_of_section

DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
}

WEIGHTS = (*EMBEDDING, *gemma2.NORMS, *ATTENTION, *ATTENTION_BIASES, *QK_NORMS, *MLP, *HEAD)


@model_family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    weights=WEIGHTS,
    defaults=DEFAULTS,
    # transformers' Gemma 3 has the field and does not apply it.
    constants=gemma2.CONSTANTS | {"attn_logit_softcapping": None},
)
def read_gemma3(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    layer_types = hf_fields.specified_layer_types(fields)
    if layer_types is None:
        layer_types = hf_fields.alternating(fields, fields.get("sliding_window_pattern", int))
    return ModelConfig(
        hidden_act=gemma2.activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=fields.get("head_dim", int),
        attention_bias=fields.get("attention_bias", bool),
        mlp_bias=False,
        qk_norm=True,
        post_norms=True,
        norm_unit_offset=True,
        scale_embeddings=True,
        query_pre_attn_scalar=fields.get("query_pre_attn_scalar", float),
        final_logit_softcapping=fields.nullable("final_logit_softcapping", float),
        **ropes(fields, layer_types, sliding_theta="rope_local_base_freq"),
        **hf_fields.sliding(fields, fields.nullable("sliding_window", int), layer_types),
        **hf_fields.common(fields),
    )


def ropes(
    fields: HFFields,
    layer_types: tuple[LayerType, ...] | list[LayerType],
    *,
    sliding_theta: str,
) -> dict[str, Any]:
    """`rope` and `sliding_rope`; a model with one type of layer has `rope` only.

    Args:
      fields: fields of the file.
      layer_types: type of each layer.
      sliding_theta: key of the theta of sliding layers in files of transformers 4.
    """
    full, local = _sections(fields, sliding_theta)
    rope = rope_of_section(fields, *full, WHOLE_HEADS)
    sliding_rope = rope_of_section(fields, *local, WHOLE_HEADS, theta_key=sliding_theta)
    kinds = set(layer_types)
    if kinds == {"full_attention"} or rope == sliding_rope:
        return {"rope": rope}
    if kinds == {"sliding_attention"}:
        return {"rope": sliding_rope}
    return {"rope": rope, "sliding_rope": sliding_rope}


Section = tuple[str, Mapping[str, Any]]


def _sections(fields: HFFields, sliding_theta: str) -> tuple[Section, Section]:
    """Names and fields of the sections for full and for sliding layers.

    transformers 5 has both in `rope_parameters`; in earlier versions `rope_scaling` applies to the
    full layers only.
    """
    nested, former = fields.group("rope_parameters"), fields.group("rope_scaling")
    if not nested:
        return ("rope_scaling", former), (sliding_theta, {})
    if former:
        raise fields.error("rope_scaling", "stands beside rope_parameters; keep one of them")
    for name, section in nested.items():
        if name not in hf_fields.LAYER_TYPES or not isinstance(section, Mapping):
            raise fields.error(
                f"rope_parameters.{name}",
                f"expected one group of fields for each of {', '.join(hf_fields.LAYER_TYPES)}",
            )
    groups = HFFields(nested, f"{fields.where}: rope_parameters", {})
    full, local = (
        (f"rope_parameters.{name}", groups.group(name)) for name in hf_fields.LAYER_TYPES
    )
    return full, local
