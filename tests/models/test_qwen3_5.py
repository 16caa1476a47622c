"""Qwen3.5 beyond the checks of all families: what is refused."""

import dataclasses
import functools
import json
from typing import Any

import pytest
from hf_models import QWEN3_5, tiny_model

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.mixtures.mola import MolaConfig
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.hf.config import model_config_from_hf


@functools.cache
def _written() -> str:
    return tiny_model("qwen3_5_text", **QWEN3_5).config.to_json_string(use_diff=False)


def _fields(**changes: Any) -> dict[str, Any]:
    fields = json.loads(_written()) | {"architectures": ["Qwen3_5ForCausalLM"]}
    return {key: value for key, value in (fields | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate: False is not supported"),
        ({"attention_bias": True}, "attention_bias: True is not supported"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types: names linear attention only"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types: names full attention only"),
        ({"layer_types": ["sliding_attention"] * 4}, "'sliding_attention' is not supported"),
        ({"layer_types": ..., "full_attention_interval": 0}, "full_attention_interval"),
        ({"linear_num_key_heads": 3}, "linear_num_key_heads: must divide"),
        ({"linear_key_head_dim": ...}, "linear_key_head_dim: this field is required"),
        (
            {"rope_parameters": {**QWEN3_5["rope_parameters"], "rope_type": "yarn", "factor": 4.0}},
            "rope_parameters.rope_type: 'yarn' is not supported",
        ),
    ],
)
def test_fields_that_are_not_computed_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        model_config_from_hf(_fields(**changes), "config.json")
    assert message in str(error.value)


def test_methods_that_do_not_fit_are_refused():
    config = model_config_from_hf(_fields(), "x")
    pair = {"rank": 2, "alpha": 2.0}
    mola = MolaConfig(**pair, num_experts=(2,), target_modules=("q_proj", "up_proj"))
    with pytest.raises(ConfigError, match="target_modules: experts on q_proj need attention of"):
        mola.check_model(config)
    dataclasses.replace(mola, target_modules=("up_proj",)).check_model(config)
    llama = dataclasses.replace(config, layer_types=None, delta_net=None)
    with pytest.raises(ConfigError, match="target_modules: out_proj are projections of linear"):
        LoraConfig(**pair, target_modules=("q_proj", "out_proj")).check_model(llama)
