"""Ministral 3: Mistral with YaRN and queries that grow with their positions, as in Llama 4."""

from moe_jax.config.model import ModelConfig
from moe_jax.config.rope import RopeConfig
from moe_jax.hf import fields as hf_fields
from moe_jax.hf.families import mistral
from moe_jax.hf.families.family import model_family
from moe_jax.hf.fields import HFFields
from moe_jax.hf.rope import RopeRules, rope_of_section, rope_section

DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
}

BETA = "llama_4_scaling_beta"
ROPE = RopeRules(types=("yarn",), own_fields={BETA: float})

# Of transformers' configuration class, for files without any.
DEFAULT_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    BETA: 0.1,
}


@model_family(
    "ministral3",
    "Ministral3ForCausalLM",
    weights=mistral.WEIGHTS,
    defaults=DEFAULTS,
    constants={"attention_bias": False, "mlp_bias": False, "layer_types": None},
)
def read_ministral3(fields: HFFields) -> ModelConfig:
    """Reads the architecture; see `Family.read`."""
    return ModelConfig(
        hidden_act=hf_fields.activation(fields),
        num_kv_heads=hf_fields.specified_kv_heads(fields),
        head_dim=fields.get("head_dim", int),
        rope=_rope(fields),
        attention_bias=False,
        mlp_bias=False,
        **hf_fields.sliding_everywhere(fields),
        **hf_fields.common(fields),
    )


def _rope(fields: HFFields) -> RopeConfig:
    name, section = rope_section(fields)
    if not section:
        return rope_of_section(fields, "rope_parameters", DEFAULT_ROPE, ROPE)
    if section.get(BETA) is None:
        raise fields.error(f"{name}.{BETA}", "this field is required and was not given")
    # transformers writes the length of the model here too, and does not read it.
    known = {key: value for key, value in section.items() if key != "max_position_embeddings"}
    return rope_of_section(fields, name, known, ROPE)
