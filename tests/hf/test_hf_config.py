"""`config.json` is read as transformers reads it, in current and former versions."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from moe_jax.config.model import ModelConfig
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import CheckpointError
from moe_jax.hf.config import model_config_from_hf, read_model_config
from moe_jax.layers.rope import rotary_tables

SIZES = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
FULL = "full_attention"
LLAMA3 = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

# Fields as they occur in files of transformers 5 and before: with integers for floats, `type` for
# `rope_type`, nulls and notes.
ROPE_FILES = {
    "nothing": {},
    "llama_2": dict(rope_scaling=None, rope_theta=10000.0),
    "codellama": dict(rope_scaling=None, rope_theta=1_000_000),
    "v5_default": dict(rope_parameters=dict(rope_theta=5e5, rope_type="default")),
    "v5_no_theta": dict(rope_parameters=dict(rope_type="linear", factor=2)),
    "v5_and_old_agree": dict(
        rope_parameters=dict(rope_theta=5e5, rope_type="default"), rope_theta=5e5
    ),
    "linear_type": dict(rope_scaling=dict(type="linear", factor=4), rope_theta=20000.0),
    "linear_both_names": dict(rope_scaling=dict(type="linear", rope_type="linear", factor=4.0)),
    "dynamic": dict(rope_scaling=dict(type="dynamic", factor=2.0)),
    "v5_dynamic": dict(rope_parameters=dict(rope_type="dynamic", factor=3.0, rope_theta=3000)),
    "llama_3.1": dict(rope_scaling=dict(rope_type="llama3", **LLAMA3), rope_theta=500000.0),
    "v5_llama_3.1": dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3)),
    "yarn_type": dict(
        rope_scaling=dict(
            type="yarn", factor=2.0, original_max_position_embeddings=32, finetuned=True
        )
    ),
    "yarn_original_length_beside": dict(
        rope_scaling=dict(rope_type="yarn", factor=4), original_max_position_embeddings=16
    ),
    "yarn_no_original_length": dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "v5_yarn": dict(
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=50_000.0,
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=16,
            beta_slow=2,
            mscale=1.0,
            mscale_all_dim=0.8,
            truncate=False,
            attention_factor=None,
        )
    ),
    "longrope": dict(
        rope_scaling=dict(
            rope_type="longrope",
            short_factor=[1.0, 1.5, 2, 2.5, 3.0, 4.0],
            long_factor=[1.0, 2.5, 4, 5.5, 7.0, 9.0],
        ),
        original_max_position_embeddings=16,
    ),
    "field_of_another_type": dict(
        rope_scaling=dict(rope_type="linear", factor=2.0, low_freq_factor=1.0)
    ),
}


@pytest.mark.parametrize("name", ROPE_FILES)
def test_rope_equals_transformers(name: str, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | ROPE_FILES[name]))
    config = read_model_config(tmp_path)
    positions = np.arange(200)[None]  # past max_position_embeddings, where `dynamic` differs
    reference = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    cos, sin = reference(torch.zeros(1), torch.as_tensor(positions))
    actual = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions)
    # 200 positions times the few float32 roundings of an inverse frequency.
    np.testing.assert_allclose(actual[0], cos.numpy(), rtol=0, atol=3e-4)
    np.testing.assert_allclose(actual[1], sin.numpy(), rtol=0, atol=3e-4)


VARIANTS = {
    "plain": {},
    "gqa": dict(num_key_value_heads=2),
    "null_kv_heads": dict(num_key_value_heads=None),
    "head_dim": dict(head_dim=10),
    "null_head_dim": dict(head_dim=None),
    "biased": dict(attention_bias=True, mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "gelu": dict(hidden_act="gelu"),
    "eps": dict(rms_norm_eps=1e-5),
    "harmless": dict(pretraining_tp=2, use_cache=False, attention_dropout=0.0, sliding_window=4),
    "neutral": dict(attn_logit_softcapping=None, residual_multiplier=1.0, layer_types=[FULL] * 2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_fields_equal_transformers(name: str, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | VARIANTS[name]))
    actual, expected = read_model_config(tmp_path), LlamaConfig.from_pretrained(tmp_path)
    assert actual == ModelConfig(
        vocab_size=expected.vocab_size,
        hidden_size=expected.hidden_size,
        intermediate_size=expected.intermediate_size,
        num_layers=expected.num_hidden_layers,
        num_heads=expected.num_attention_heads,
        num_kv_heads=expected.num_key_value_heads,
        head_dim=expected.head_dim,
        hidden_act=expected.hidden_act,
        max_position_embeddings=expected.max_position_embeddings,
        rms_norm_eps=expected.rms_norm_eps,
        rope=RopeConfig(rope_type="default", rope_theta=10_000.0),
        attention_bias=expected.attention_bias,
        mlp_bias=expected.mlp_bias,
        tie_word_embeddings=expected.tie_word_embeddings,
    )


def test_round_trip_of_a_file_that_transformers_wrote(tmp_path):
    LlamaConfig(
        **SIZES | dict(head_dim=16, num_key_value_heads=1, tie_word_embeddings=True),
        rope_parameters=dict(rope_type="llama3", rope_theta=5e5, **LLAMA3),
    ).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert config.rope == RopeConfig(rope_type="llama3", rope_theta=5e5, **LLAMA3)
    assert (config.head_dim, config.num_kv_heads, config.tie_word_embeddings) == (16, 1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(architectures=["MixtralForCausalLM"], model_type="mixtral"), r"MixtralForCausalLM"),
        (dict(architectures=["LlamaForCausalLM"], model_type="mistral"), r"'mistral'.*supported: "),
        (
            dict(architectures=["LlamaForSequenceClassification"]),
            r"the nearest is llama \(LlamaForCausalLM\).*; supported: .*llama",
        ),
        (dict(architectures=None, model_type=None), r"architecture none"),
        (dict(quantization_config=dict(quant_method="gptq")), r"quantization_config"),
        (dict(hidden_act="geluu"), r"hidden_act: 'geluu'.*'gelu'"),
        (dict(hidden_size=None), r"hidden_size: this field is required"),
        (dict(hidden_size="48"), r"hidden_size: expected int, got str"),
        (dict(tie_word_embeddings=1), r"tie_word_embeddings: expected bool"),
        (dict(num_key_value_heads=3), r"num_key_value_heads: must divide"),
        (dict(num_key_value_heads=0), r"num_key_value_heads: must divide"),
        (dict(num_hidden_layers=0), r"num_hidden_layers: must be positive"),
        (dict(hidden_size=50), r"hidden_size: 50 is not a multiple of num_attention_heads"),
        (dict(head_dim=7), r"head_dim: must be even"),
        (dict(rope_theta=0), r"rope_theta: must be greater than 1"),
        (dict(rope_scaling="linear"), r"rope_scaling: expected a group of fields"),
        (dict(rope_scaling=dict(type="su", factor=2)), r"rope_type: 'su'.*supported: default"),
        (dict(rope_scaling=dict(rope_type="longrope")), r"short_factor: .*'longrope' needs it"),
        (dict(attn_logit_softcapping=50.0), r"attn_logit_softcapping: 50.0 .* type 'llama'"),
        (dict(attention_chunk_size=8192), r"attention_chunk_size: 8192 is not supported"),
        (dict(residual_multiplier=0.22), r"residual_multiplier: 0.22 is not supported"),
        (dict(layer_types=["sliding_attention"] * 2), r"layer_types: .* is not supported"),
        (dict(rope_scaling=dict(factor=2.0)), r"rope_scaling: has no rope_type"),
        (dict(rope_scaling=dict(rope_type="linear")), r"rope_scaling.factor: .*'linear' needs it"),
        (dict(rope_scaling=dict(rope_type="linear", factor=0)), r"factor: must be positive"),
        (dict(rope_scaling=dict(rope_type="linear", factor="2")), r"factor: expected float"),
        (dict(rope_scaling=dict(rope_type="linear", fakctor=2)), r"fakctor: unknown.*'factor'"),
        (dict(rope_scaling=dict(rope_type="yarn", type="linear", factor=2)), r"contradicts"),
        (
            dict(rope_parameters=dict(rope_type="default", rope_theta=1e4), rope_theta=5e5),
            r"rope_theta: 10000.0 contradicts rope_theta 500000.0",
        ),
        (
            dict(
                rope_parameters=dict(rope_type="default"),
                rope_scaling=dict(rope_type="linear", factor=2.0),
            ),
            r"rope_parameters contradicts rope_scaling",
        ),
        (dict(partial_rotary_factor=0.5), r"partial_rotary_factor"),
        (
            dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.25)),
            r"partial_rotary_factor",
        ),
    ],
)
def test_refused(change: dict, message: str):
    with pytest.raises(CheckpointError, match=message) as caught:
        model_config_from_hf(SIZES | change, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "llama",', r"not valid JSON \(.*line 1"),
        (b"\xff\xfe", r"not valid JSON"),
        (b"[1]", r"expected an object, got list"),
    ],
)
def test_malformed_file(content: bytes, message: str, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_model_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter"):
        read_model_config(tmp_path)
