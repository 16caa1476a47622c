"""Hunyuan dense (0.5B to 7B): Llama with queries and keys normalized after they are rotated."""

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import parse
from moe_jax.config.rope import RopeConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families.family import (
    ATTENTION,
    ATTENTION_BIASES,
    EMBEDDING,
    HEAD,
    MLP,
    PRE_NORMS,
    model_family,
    norm,
)
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import WHOLE_HEADS, rope_of_section, rope_section

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}

WEIGHTS = (
    *EMBEDDING,
    *PRE_NORMS,
    *ATTENTION,
    *ATTENTION_BIASES,
    norm("self_attn.query_layernorm", "self_attn.q_norm", "W"),
    norm("self_attn.key_layernorm", "self_attn.k_norm", "W"),
    *MLP,
    *HEAD,
)


@model_family(
    "hunyuan_v1_dense",
    "HunYuanDenseV1ForCausalLM",
    weights=WEIGHTS,
    defaults=DEFAULTS,
    # Published files have fields of the mixture of experts of the same code.
    constants={"mlp_bias": False, "use_qk_norm": True, "use_cla": False, "num_experts": 1},
)
def read_hunyuan(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    head_dim = hf_fields.head_dim_or_quotient(fields)
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.kv_heads_or_heads(fields),
        head_dim=head_dim,
        rope=_rope(fields, head_dim),
        attention_bias=fields.get("attention_bias", bool),
        mlp_bias=False,
        qk_norm=True,
        qk_norm_of="rotated_head",
        **hf_fields.common(fields),
    )


def _rope(fields: HFFields, head_dim: int) -> RopeConfig:
    """The rotary embedding; `dynamic` with `alpha` is a larger theta at every length."""
    name, section = rope_section(fields)
    alpha = parse(float | None, section.get("alpha"), f"{fields.where}: {name}.alpha")
    rest = {key: value for key, value in section.items() if key != "alpha"}
    rope = rope_of_section(fields, name, rest, WHOLE_HEADS)
    if not alpha or rope.rope_type != "dynamic":
        return rope
    if alpha < 0 or head_dim <= 2:
        raise fields.error(f"{name}.alpha", "must be positive, of heads of at least 4 channels")
    theta = rope.rope_theta * alpha ** (head_dim / (head_dim - 2))
    return RopeConfig(rope_type="default", rope_theta=theta)
