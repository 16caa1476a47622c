"""Mistral 7B and its successors: Llama with one sliding window in all layers, or none."""

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import ATTENTION, EMBEDDING, HEAD, MLP, PRE_NORMS, model_family
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}

WEIGHTS = (*EMBEDDING, *PRE_NORMS, *ATTENTION, *MLP, *HEAD)


@model_family(
    "mistral",
    "MistralForCausalLM",
    weights=WEIGHTS,
    defaults=DEFAULTS,
    constants={"attention_bias": False, "mlp_bias": False, "layer_types": None},
)
def read_mistral(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=hf_fields.head_dim_or_quotient(fields),
        rope=read_rope(fields),
        attention_bias=False,
        mlp_bias=False,
        **hf_fields.sliding_everywhere(fields),
        **hf_fields.common(fields),
    )
