"""The message about architectures of no known family: the nearest family and the differences."""

import json

import pytest
from transformers import AutoConfig

from moe_jax.cli import main
from moe_jax.errors import CheckpointError
from moe_jax.hf.config import model_config_from_hf
from moe_jax.hf.families import FAMILIES


def _fields(model_type: str) -> dict:
    """All fields of transformers' default configuration."""
    fields = json.loads(AutoConfig.for_model(model_type).to_json_string())
    return fields | {"architectures": [f"Some{model_type}"]}


def _message(fields: dict) -> str:
    with pytest.raises(CheckpointError) as caught:
        model_config_from_hf(fields, "config.json")
    return str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "nearest", "differences"),
    [
        ("mixtral", "mistral (MistralForCausalLM)", ["num_local_experts 8"]),
        (
            "qwen3_moe",
            "qwen3 (Qwen3ForCausalLM)",
            ["moe_intermediate_size 768", "num_experts_per_tok 8"],
        ),
        ("starcoder2", "llama (LlamaForCausalLM)", ["norm_epsilon 1e-05", "use_bias True"]),
        ("arcee", "llama (LlamaForCausalLM)", ["hidden_act: 'relu2' is not supported"]),
        ("qwen3_next", "qwen3 (Qwen3ForCausalLM)", ["linear_conv_kernel_dim 4", " more; "]),
        ("olmoe", "olmo2 (Olmo2ForCausalLM)", ["num_experts 64"]),
    ],
)
def test_the_nearest_family_and_what_it_lacks(model_type, nearest, differences):
    message = _message(_fields(model_type))
    start = f"config.json: architecture Some{model_type} of model_type '{model_type}' is not"
    assert message.startswith(start) and "\n" not in message
    assert f"the nearest is {nearest}, which does not compute " in message
    assert all(words in message for words in differences)
    assert message.endswith(f"; supported: {', '.join(FAMILIES)}")
    # Settings of training and fields that are off are no differences.
    quiet = ("initializer_range", "attention_dropout", "use_cache", "token_id", " False", " None")
    assert not any(words in message for words in quiet)


def test_a_file_whose_fields_are_all_known():
    message = _message(_fields("helium"))
    assert "the nearest is llama (LlamaForCausalLM), which computes every field" in message


def test_layers_of_an_unknown_kind_are_named_once():
    fields = _fields("qwen3") | {"model_type": "qwen9"}
    fields["layer_types"] = ["linear_attention"] * len(fields["layer_types"])
    message = _message(fields)
    assert (
        "the nearest is qwen3 (Qwen3ForCausalLM), which does not compute layer_types: " in message
    )
    assert "'linear_attention' is not supported" in message
    assert message.count("layer_types") == 1


def test_a_language_model_inside_another():
    inner = _fields("qwen3") | {"model_type": "qwen9_text", "mrope_interleaved": True}
    message = _message({"model_type": "qwen9", "text_config": inner})
    assert message.startswith(
        "config.json: text_config.model_type: a language model of type 'qwen9_text' is not"
    )
    assert "the nearest is qwen3 (Qwen3ForCausalLM), which does not compute mrope_inte" in message


def test_settings_of_classifiers_are_no_difference():
    message = _message(_fields("gpt_neox") | {"classifier_dropout": 0.1})
    assert "use_parallel_residual True" in message and "classifier" not in message


def test_inspect_says_it_in_one_line(tmp_path, capsys):
    AutoConfig.for_model("mixtral").save_pretrained(tmp_path)
    assert main(["inspect", "--base", str(tmp_path)]) != 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the nearest is mistral (MistralForCausalLM), which does not compute " in line
