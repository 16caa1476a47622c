"""Gemma: scaled embeddings, norm scales with unit offset, and tanh-approximated GELU."""

from moe_jax.config.model import ModelConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    EMBEDDING,
    HEAD,
    MLP,
    PRE_NORMS,
    model_family,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import read_rope

DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
}

WEIGHTS = (*EMBEDDING, *PRE_NORMS, *ATTENTION, *ATTENTION_BIASES, *MLP, *HEAD)


@model_family(
    "gemma",
    "GemmaForCausalLM",
    weights=WEIGHTS,
    defaults=DEFAULTS,
    constants={"mlp_bias": False, "use_bidirectional_attention": False},
)
def read_gemma(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(
        hidden_act=_activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=fields.get("head_dim", int),
        rope=read_rope(fields),
        attention_bias=fields.get("attention_bias", bool),
        mlp_bias=False,
        norm_unit_offset=True,
        scale_embeddings=True,
        **hf_fields.common(fields),
    )


def _activation(fields: HFFields) -> str:
    name = fields.get("hidden_act", str)
    if name == "gelu":  # written by the first releases for the approximation
        name = DEFAULTS["hidden_act"]
    # Former versions of transformers read the second name first.
    other = fields.optional("hidden_activation", str)
    if other not in (None, name):
        raise fields.error("hidden_activation", f"{other!r} contradicts hidden_act; keep one")
    return hf_fields.supported_activation(fields, "hidden_act", name)
