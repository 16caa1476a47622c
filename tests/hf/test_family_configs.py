"""The `config.json` of every family: current and former files, and invalid ones."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from moe_jax.config.model import ModelConfig
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import CheckpointError
from moe_jax.hf.config import model_config_from_hf, read_model_config
from moe_jax.hf.families import FAMILIES

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
FULL, SLIDING = "full_attention", "sliding_attention"
PAD = dict(pad_token_id=None)

# Fields as in files on the hub, written by transformers 4: layers by patterns, rotary embeddings by
# rope_theta and rope_scaling, without fields that have their defaults.
OLD_FILES = {
    "mistral_0.1": ("mistral", dict(sliding_window=4096, rope_theta=10000.0)),
    "mistral_0.3": ("mistral", dict(sliding_window=None, rope_theta=1e6)),
    "mistral_no_window_field": ("mistral", {}),
    "qwen2.5": ("qwen2", dict(rope_theta=1e6, sliding_window=32768, max_window_layers=28)),
    "qwen2_sliding": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=128, max_window_layers=3),
    ),
    "qwen2_no_layer_slides": ("qwen2", dict(use_sliding_window=True, max_window_layers=4)),
    "qwen2_null_window": ("qwen2", dict(use_sliding_window=True, sliding_window=None)),
    "qwen2_yarn": (
        "qwen2",
        dict(
            rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=32768),
            max_position_embeddings=131072,
        ),
    ),
    "qwen3": ("qwen3", dict(attention_bias=False, rope_theta=1e6, rope_scaling=None)),
    "qwen3_biased_sliding": (
        "qwen3",
        dict(attention_bias=True, use_sliding_window=True, sliding_window=64, max_window_layers=1),
    ),
    "gemma_first_release": ("gemma", dict(hidden_act="gelu", rope_theta=10000.0)),
    "gemma_both_names": (
        "gemma",
        dict(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh", rope_theta=10000.0),
    ),
    "gemma2": (
        "gemma2",
        dict(
            query_pre_attn_scalar=224,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=4096,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            rope_theta=10000.0,
        ),
    ),
    "gemma2_defaults": ("gemma2", {}),
    "gemma2_uncapped": (
        "gemma2",
        dict(attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "gemma3": (
        "gemma3_text",
        dict(
            sliding_window=512,
            sliding_window_pattern=3,
            rope_theta=1000000,
            rope_local_base_freq=10000,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
        ),
    ),
    "gemma3_defaults": ("gemma3_text", {}),
    "gemma3_one_theta": ("gemma3_text", dict(rope_local_base_freq=1e6, sliding_window_pattern=2)),
    "phi3_4k": ("phi3", dict(sliding_window=2047, rope_scaling=None, rope_theta=10000.0)),
    "phi3_128k": (
        "phi3",
        dict(
            rope_scaling=dict(
                type="longrope",
                short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                long_factor=[1.0, 2, 4, 8, 16, 32.5, 40, 50],
            ),
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            sliding_window=262144,
        ),
    ),
    "phi4_mini": (
        "phi3",
        dict(
            partial_rotary_factor=0.75,
            tie_word_embeddings=True,
            rope_scaling=dict(
                type="longrope", short_factor=[1.0] * 6, long_factor=[1.0, 2.5, 6.0, 12.0, 20, 30]
            ),
            max_position_embeddings=131072,
        ),
    ),
    "glm": ("glm", dict(rope_theta=10000.0, partial_rotary_factor=0.5)),
    "glm4": ("glm4", dict(attention_bias=True, rms_norm_eps=1e-5)),
    "smollm3": (
        "smollm3",
        dict(
            no_rope_layers=[1, 1, 1, 0],
            layer_types=[FULL] * 4,
            use_sliding_window=False,
            rope_theta=5e6,
        ),
    ),
    "smollm3_pattern": ("smollm3", dict(no_rope_layer_interval=2, no_rope_layers=None)),
    "smollm3_sliding": ("smollm3", dict(use_sliding_window=True, sliding_window=64)),
    "olmo2": ("olmo2", dict(rope_theta=500000, rms_norm_eps=1e-6)),
    "olmo3": (
        "olmo3",
        dict(
            rope_theta=500000,
            rope_scaling=dict(
                rope_type="yarn",
                factor=8.0,
                original_max_position_embeddings=8192,
                attention_factor=1.2079441541679836,
                beta_fast=32.0,
                beta_slow=1.0,
            ),
            max_position_embeddings=65536,
        ),
    ),
    "olmo3_defaults": ("olmo3", {}),
    "ministral3_defaults": ("ministral3", {}),
    "ministral3": (
        "ministral3",
        dict(
            rope_scaling=dict(
                type="yarn",
                factor=16.0,
                original_max_position_embeddings=16384,
                beta_fast=32.0,
                beta_slow=1.0,
                llama_4_scaling_beta=0.1,
            ),
            rope_theta=1e6,
        ),
    ),
    "granite": (
        "granite",
        dict(
            attention_multiplier=0.0078125,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            logits_scaling=8.0,
            rope_theta=1e7,
            tie_word_embeddings=True,
        ),
    ),
    "granite_defaults": ("granite", {}),
    "granite4_micro": (
        "granitemoehybrid",
        dict(
            attention_multiplier=0.015625,
            embedding_multiplier=12,
            residual_multiplier=0.22,
            logits_scaling=10,
            layer_types=["attention"] * 4,
            num_local_experts=0,
            num_experts_per_tok=0,
            position_embedding_type="rope",
            rope_theta=1e7,
            shared_intermediate_size=80,
            mamba_n_heads=8,
        ),
    ),
    "exaone4_32b": (
        "exaone4",
        dict(
            sliding_window=4096,
            sliding_window_pattern="LLLG",
            layer_types=[SLIDING, SLIDING, SLIDING, FULL],
            rope_theta=1e6,
        ),
    ),
    "exaone4_1.2b": (
        "exaone4",
        dict(
            sliding_window=None,
            sliding_window_pattern=None,
            layer_types=[FULL] * 4,
            tie_word_embeddings=True,
        ),
    ),
    "exaone4_pattern": ("exaone4", dict(sliding_window=64, sliding_window_pattern=2)),
    "seed_oss": ("seed_oss", dict(rope_scaling=dict(rope_type="default"), rope_theta=1e7)),
    "cohere2": (
        "cohere2",
        dict(
            logit_scale=0.25,
            sliding_window_pattern=2,
            rope_theta=50000,
            rotary_pct=1.0,
            use_gated_activation=True,
            use_parallel_block=True,
            use_qk_norm=False,
        ),
    ),
    "hunyuan": (
        "hunyuan_v1_dense",
        dict(
            num_experts=1,
            use_cla=False,
            use_qk_norm=True,
            rope_scaling=dict(
                type="dynamic",
                alpha=1000.0,
                factor=1.0,
                beta_fast=32,
                beta_slow=1,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
    ),
    "glm4_no_biases": ("glm4", dict(attention_bias=False, partial_rotary_factor=1.0)),
}


def _file(model_type: str, fields: dict) -> dict:
    head = dict(architectures=[FAMILIES[model_type].architecture], model_type=model_type)
    return head | SIZES | fields


@pytest.mark.parametrize("name", OLD_FILES)
def test_a_file_equals_transformers_rewrite_of_it(name, tmp_path):
    model_type, fields = OLD_FILES[name]
    mapping = _file(model_type, fields)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(mapping))
    old = read_model_config(tmp_path / "old")
    AutoConfig.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "rope_parameters" in new and not {"rope_theta", "rope_scaling"} & set(new)
    new["architectures"] = mapping["architectures"]
    assert model_config_from_hf(new, "new") == old


@pytest.mark.parametrize("former", ["su", "yarn"])
def test_former_names_of_longrope(former):
    # transformers renames them too, but 5.23 then misses a field and stops.
    model_type, fields = OLD_FILES["phi3_128k"]
    renamed = fields | dict(rope_scaling=fields["rope_scaling"] | dict(type=former))
    assert _read(model_type, **renamed) == _read(model_type, **fields)


def _read(model_type: str, **fields) -> ModelConfig:
    return model_config_from_hf(_file(model_type, fields), "config.json")


def test_sliding_layers():
    def pattern(model_type: str, **fields) -> tuple:
        config = _read(model_type, **fields)
        return config.sliding_window, config.sliding_layers

    none = (None, (False,) * 4)
    assert pattern("mistral") == (4096, (True,) * 4)
    assert pattern("mistral", sliding_window=None) == none
    assert pattern("qwen2", sliding_window=8, max_window_layers=1) == none
    qwen = dict(use_sliding_window=True, sliding_window=8)
    assert pattern("qwen2", **qwen, max_window_layers=1) == (8, (False, True, True, True))
    types = [SLIDING, FULL, FULL, SLIDING]
    assert pattern("qwen3", **qwen, layer_types=types) == (8, (True, False, False, True))
    assert pattern("gemma2") == (4096, (True, False, True, False))
    assert pattern("gemma2", layer_types=[FULL] * 4) == none
    assert pattern("gemma3_text", sliding_window_pattern=3) == (4096, (True, True, False, True))
    assert pattern("gemma3_text") == (4096, (True,) * 4)  # the first of a pattern of six
    assert pattern("llama", sliding_window=4) == none  # ignored by transformers
    assert pattern("olmo3") == (4096, (True, True, True, False))
    assert pattern("cohere2", sliding_window_pattern=2) == (4096, (True, False, True, False))


def test_layers_that_do_not_rotate():
    def rotated(model_type: str, **fields) -> tuple | None:
        return _read(model_type, **fields).rotated_layers

    first_three = (True, True, True, False)
    assert rotated("smollm3") == rotated("exaone4") == rotated("cohere2") == first_three
    assert rotated("smollm3", no_rope_layers=[0, 1, 0, 1, 1]) == (False, True, False, True)
    assert rotated("smollm3", no_rope_layers=[1] * 4) is None
    assert rotated("exaone4", sliding_window=None) is None  # without windows all layers rotate
    assert rotated("exaone4", layer_types=[FULL] * 4) == (False,) * 4
    assert rotated("cohere2", layer_types=[SLIDING] * 4) is None
    sliding = _read("smollm3", use_sliding_window=True, sliding_window=8)
    assert sliding.sliding_layers == (False, False, False, True)  # those that do not rotate


def test_factors_of_granite():
    config = _read(
        "granite",
        attention_multiplier=0.125,
        embedding_multiplier=12,
        residual_multiplier=0.22,
        logits_scaling=8,
    )
    assert config.query_pre_attn_scalar == 64.0  # its root divides scores
    assert (config.embedding_multiplier, config.residual_multiplier) == (12.0, 0.22)
    assert config.logit_scale == 0.125
    plain = _read("granite")
    factors = plain.embedding_multiplier, plain.residual_multiplier, plain.logit_scale
    assert factors == (None, None, None) and plain.query_pre_attn_scalar == 1.0


def test_gemma_3_has_a_rope_for_each_layer_type():
    scaled = dict(rope_type="linear", factor=8.0)
    config = _read("gemma3_text", sliding_window_pattern=2, rope_scaling=scaled, rope_theta=5e5)
    assert config.rope == RopeConfig(rope_type="linear", factor=8.0, rope_theta=5e5)
    assert config.sliding_rope == RopeConfig(rope_type="default", rope_theta=10_000.0)
    only_sliding = _read("gemma3_text", layer_types=[SLIDING] * 4, rope_scaling=scaled)
    assert only_sliding.rope == config.sliding_rope and only_sliding.sliding_rope is None
    only_full = _read("gemma3_text", layer_types=[FULL] * 4, rope_scaling=scaled, rope_theta=5e5)
    assert only_full.rope == config.rope and only_full.sliding_rope is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_that_transformers_documents(model_type):
    config = type(AutoConfig.for_model(model_type, **PAD))
    documented = {field.name: field.default for field in dataclasses.fields(config)}
    theta = config.default_theta
    if isinstance(theta, dict):
        documented |= dict(rope_theta=theta["global"], rope_local_base_freq=theta["local"])
        documented |= dict(sliding_window_pattern=config(**PAD)._sliding_window_pattern)
    else:
        documented |= dict(rope_theta=theta)
    defaults = FAMILIES[model_type].defaults
    assert {name: documented[name] for name in defaults} == defaults
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
    assert not defaults.keys() & (sizes | {"vocab_size", "head_dim", "intermediate_size"})


LONGROPE = dict(type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("mistral", dict(attention_bias=True), r"attention_bias: True is not supported.*'mistral'"),
        ("mistral", dict(layer_types=[SLIDING] * 4), r"layer_types: .* is not supported"),
        ("mistral", dict(sliding_window=0), r"sliding_window: must be positive"),
        ("mistral", dict(sliding_window=4.5), r"sliding_window: expected int"),
        ("mistral", dict(attn_logit_softcapping=30.0), r"attn_logit_softcapping: 30.0"),
        ("qwen2", dict(attention_bias=False), r"attention_bias: False is not supported"),
        ("qwen2", dict(use_mrope=True), r"use_mrope: True is not supported"),
        ("qwen2", dict(layer_types=[SLIDING] * 4), r"layer_types: .* use_sliding_window"),
        ("qwen2", dict(layer_types=[FULL] * 3), r"layer_types: names 3 layers, .* is 4"),
        ("qwen3", dict(layer_types=["chunked_attention"] * 4), r"'chunked_attention' .* supported"),
        ("qwen3", dict(mlp_bias=True), r"mlp_bias: True is not supported"),
        ("qwen3", dict(rope_parameters={FULL: {}}), r"full_attention: unknown field"),
        ("qwen3", dict(num_experts=8), r"num_experts: 8 is not supported"),
        ("gemma", dict(use_bidirectional_attention=True), r"use_bidirectional_attention: True"),
        ("gemma", dict(hidden_activation="silu"), r"hidden_activation: 'silu' contradicts"),
        ("gemma", dict(hidden_act="quick_gelu"), r"hidden_act: 'quick_gelu' is not supported"),
        ("gemma", dict(query_pre_attn_scalar=9), r"query_pre_attn_scalar: 9 is not supported"),
        ("gemma2", dict(hidden_act="silu"), r"hidden_act: 'silu' contradicts hidden_activation"),
        ("gemma2", dict(sliding_window=None), r"sliding_window: must be given"),
        ("gemma2", dict(attn_logit_softcapping=0.0), r"attn_logit_softcapping: must be positive"),
        ("gemma3_text", dict(attn_logit_softcapping=50.0), r"attn_logit_softcapping: 50.0"),
        ("gemma3_text", dict(sliding_window_pattern=0), r"sliding_window_pattern: must be"),
        (
            "gemma3_text",
            dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
            r"rope_parameters.rope_type: expected one group of fields for each of",
        ),
        (
            "gemma3_text",
            dict(rope_parameters={FULL: {}, "chunked_attention": {}}),
            r"rope_parameters.chunked_attention: expected one group",
        ),
        (
            "gemma3_text",
            dict(
                rope_parameters={FULL: dict(rope_type="linear", factor=2.0)},
                rope_scaling=dict(rope_type="linear", factor=8.0),
            ),
            r"rope_scaling: stands beside rope_parameters",
        ),
        (
            "gemma3_text",
            dict(rope_parameters={FULL: dict(rope_theta=1e6)}, rope_theta=5e5),
            r"rope_parameters.full_attention.rope_theta: 1000000.0 contradicts rope_theta 500000",
        ),
        ("phi3", dict(rope_scaling=dict(type="linear", factor=2.0)), r"'linear' is not supported"),
        ("phi3", dict(rope_scaling=LONGROPE | dict(long_factor=[1.0])), r"long_factor: must have"),
        (
            "phi3",
            dict(rope_scaling=LONGROPE | dict(original_max_position_embeddings=16)),
            r"original_max_position_embeddings: 16 is ignored.*uses 4096",
        ),
        ("phi3", dict(rope_scaling=LONGROPE | dict(short_factor=[0.0] * 8)), r"must be positive"),
        ("phi3", dict(partial_rotary_factor=0.2), r"partial_rotary_factor: 0.2 of head_dim 16"),
        ("phi3", dict(partial_rotary_factor=1.5), r"partial_rotary_factor: must lie in \(0, 1\]"),
        (
            "phi3",
            dict(
                partial_rotary_factor=0.5,
                rope_parameters=dict(rope_type="default", partial_rotary_factor=0.75),
            ),
            r"partial_rotary_factor: 0.75 contradicts partial_rotary_factor 0.5",
        ),
        (
            "smollm3",
            dict(no_rope_layers=[1, 0]),
            r"no_rope_layers: must be 0 or 1 for each",
        ),
        ("smollm3", dict(no_rope_layers=[1, 2, 1, 1]), r"no_rope_layers: must be 0 or 1"),
        ("smollm3", dict(no_rope_layer_interval=0), r"no_rope_layer_interval: must be positive"),
        ("smollm3", dict(layer_types=[SLIDING] * 4), r"sliding_window: must be given"),
        ("olmo2", dict(clip_qkv=8.0), r"clip_qkv: 8.0 is not supported in .* 'olmo2'"),
        ("olmo3", dict(sliding_window=None), r"sliding_window: must be given"),
        (
            "ministral3",
            dict(rope_scaling=dict(type="yarn", factor=16.0)),
            r"rope_scaling.llama_4_scaling_beta: this field is required",
        ),
        (
            "ministral3",
            dict(rope_parameters=dict(rope_type="default", llama_4_scaling_beta=0.1)),
            r"rope_type: 'default' is not supported; supported: yarn",
        ),
        (
            "mistral",
            dict(rope_scaling=dict(type="yarn", factor=16.0, llama_4_scaling_beta=0.1)),
            r"rope_scaling.llama_4_scaling_beta: unknown field",
        ),
        ("granite", dict(logits_scaling=0), r"logits_scaling: must be positive"),
        ("granite", dict(num_local_experts=8), r"num_local_experts: 8 is not supported"),
        ("granitemoehybrid", {}, r"num_local_experts: 8 is not supported; only 0, dense models"),
        (
            "granitemoehybrid",
            dict(num_local_experts=0, layer_types=["mamba", "attention", "mamba", "mamba"]),
            r"layer_types: 'mamba' is not supported; all layers must be 'full_attention'",
        ),
        (
            "granitemoehybrid",
            dict(num_local_experts=0, layer_types=[FULL] * 3),
            r"layer_types: must name 4 layers",
        ),
        (
            "granitemoehybrid",
            dict(num_local_experts=0, layer_types=[FULL] * 4, position_embedding_type="alibi"),
            r"position_embedding_type: 'alibi' is not supported",
        ),
        ("exaone4", dict(sliding_window_pattern="LLLG"), r"'LLLG' is not read; give layer_types"),
        ("exaone4", dict(sliding_window_pattern=0), r"sliding_window_pattern: must be positive"),
        (
            "seed_oss",
            dict(attention_bias=False, attention_out_bias=True),
            r"attention_out_bias: True is not supported without attention_bias",
        ),
        ("cohere2", dict(use_qk_norm=True), r"use_qk_norm: True is not supported"),
        ("cohere2", dict(use_parallel_block=False), r"use_parallel_block: False is not supported"),
        ("cohere2", dict(sliding_window=None), r"sliding_window: must be given"),
        ("hunyuan_v1_dense", dict(num_experts=64), r"num_experts: 64 is not supported"),
        (
            "hunyuan_v1_dense",
            dict(rope_scaling=dict(type="dynamic", factor=1.0, alpha=-1.0)),
            r"rope_scaling.alpha: must be positive",
        ),
        ("glm4", dict(partial_rotary_factor=0.01), r"partial_rotary_factor: 0.01 of head_dim 16"),
        ("glm4", dict(tie_word_embeddings="no"), r"tie_word_embeddings: expected bool"),
    ],
)
def test_refused(model_type, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        _read(model_type, **change)
    assert str(caught.value).startswith("config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["num_key_value_heads", "head_dim", "vocab_size"])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma", "gemma2", "gemma3_text", "glm", "glm4"])
def test_sizes_have_no_defaults(model_type, field):
    mapping = _file(model_type, {})
    del mapping[field]
    with pytest.raises(CheckpointError, match=rf"config.json: {field}: this field is required"):
        model_config_from_hf(mapping, "config.json")
