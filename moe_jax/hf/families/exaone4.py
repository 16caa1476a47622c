"""EXAONE 4: norms after attention and FFN; its hybrids rotate the sliding layers only."""

from typing import Any

from moe_jax.config.model import LayerType, ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    MLP,
    OUTPUT_NORMS,
    QK_NORMS,
    model_family,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope
from moe_jax.terminal import value_text

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}

WEIGHTS = (*EMBEDDING, *OUTPUT_NORMS, *ATTENTION, *QK_NORMS, *MLP, *HEAD)


@model_family(
    "exaone4",
    "Exaone4ForCausalLM",
    weights=WEIGHTS,
    defaults=DEFAULTS,
    constants={"attention_bias": False, "mlp_bias": False},
)
def read_exaone4(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    window = fields.nullable("sliding_window", int)
    layer_types = _layer_types(fields, window)
    rotated = tuple(kind == "sliding_attention" for kind in layer_types)
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=hf_fields.head_dim_or_quotient(fields),
        rope=read_rope(fields),
        rotated_layers=None if window is None or all(rotated) else rotated,
        attention_bias=False,
        mlp_bias=False,
        qk_norm=True,
        pre_norms=False,
        post_norms=True,
        **hf_fields.sliding(fields, window, layer_types),
        **hf_fields.common(fields),
    )


def _layer_types(fields: HFFields, window: int | None) -> tuple[LayerType, ...] | list[LayerType]:
    """`layer_types`; by default those of `sliding_window_pattern`, and full without a window."""
    specified = hf_fields.specified_layer_types(fields)
    pattern = fields.nullable("sliding_window_pattern", Any)
    if specified is not None:
        return specified
    if window is None or pattern is None:
        return ["full_attention"] * fields.get("num_hidden_layers", int)
    if type(pattern) is not int:  # published files with a word such as LLLG have layer_types too
        raise fields.error(
            "sliding_window_pattern", f"{value_text(pattern)} is not read; give layer_types"
        )
    return hf_fields.alternating(fields, pattern)
