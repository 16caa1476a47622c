"""SmolLM3: Llama without rotary embedding in every fourth layer."""

from moe_jax.config.model import LayerType, ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families import llama
from moe_jax.hf.families.family import model_family
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2_000_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layer_interval": 4,
}


@model_family("smollm3", "SmolLM3ForCausalLM", weights=llama.WEIGHTS, defaults=DEFAULTS)
def read_smollm3(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    rotated = _rotated_layers(fields)
    window = None
    if fields.get("use_sliding_window", bool):
        window = fields.nullable("sliding_window", int)
    default_types: list[LayerType] = [
        "full_attention" if window is None or rotates else "sliding_attention"
        for rotates in rotated
    ]
    layer_types = hf_fields.specified_layer_types(fields) or default_types
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=hf_fields.head_dim_or_quotient(fields),
        rope=read_rope(fields),
        rotated_layers=None if all(rotated) else rotated,
        attention_bias=fields.get("attention_bias", bool),
        mlp_bias=fields.get("mlp_bias", bool),
        **hf_fields.sliding(fields, window, layer_types),
        **hf_fields.common(fields),
    )


def _rotated_layers(fields: HFFields) -> tuple[bool, ...]:
    """`no_rope_layers`, in which 1 is a layer that rotates; by default all but every fourth."""
    layers = fields.get("num_hidden_layers", int)
    specified = fields.optional("no_rope_layers", tuple[int, ...])
    interval = fields.get("no_rope_layer_interval", int)
    if specified is None:
        if interval < 1:
            raise fields.error("no_rope_layer_interval", "must be positive")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if len(specified) < layers or set(specified) - {0, 1}:
        raise fields.error("no_rope_layers", f"must be 0 or 1 for each of the {layers} layers")
    return tuple(rotates == 1 for rotates in specified[:layers])
