"""Gemma 4 beyond the checks of all families: exchange with peft, sizes in two layouts, refusals."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from foreign_adapters import LORA, peft_logits
from hf_models import TINY_SIZES, tiny_model
from safetensors.numpy import load_file, save_file
from tolerances import FLOAT32_LOGITS
from whole_models import adapter_of

import moe_jax
from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.mixtures.mola import MolaConfig
from moe_jax.config.attention import GlobalAttentionConfig
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.hf.config import model_config_from_hf
from moe_jax.serving.load import open_models

FIELDS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 5,
    "hidden_size_per_layer_input": 0,
}
SMALL = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 64}
E2B = {**FIELDS, **SMALL, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 16))


def test_adapters_and_merged_models_in_other_libraries(tmp_path):
    reference = tiny_model("gemma4_text", **FIELDS)
    reference.save_pretrained(tmp_path / "base")
    base = moe_jax.load_base(tmp_path / "base")
    adapter = adapter_of(base, LORA)
    assert adapter.tree["layers"]["global_attn"].keys() == {"q_proj", "k_proj", "o_proj"}
    expected = np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(TOKENS, "x"))
    plain = np.asarray(moe_jax.AdaptedModel(base, {})(TOKENS))
    assert np.abs(expected - plain).max() > 0.5

    moe_jax.export_adapter(adapter, "peft", tmp_path / "adapter")
    found = peft_logits(reference, tmp_path / "adapter", TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_LOGITS)
    read = moe_jax.import_adapter(tmp_path / "adapter", base)
    jax.tree.map(np.testing.assert_array_equal, read.tree, adapter.tree)

    moe_jax.export_adapter(adapter, "llama", tmp_path / "merged")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        merged = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(merged, expected, rtol=0, atol=FLOAT32_LOGITS)


@functools.cache
def _written() -> str:
    return tiny_model("gemma4_text", **FIELDS).config.to_json_string(use_diff=False)


def _fields(**changes: Any) -> dict[str, Any]:
    """Fields as transformers writes them; None takes one out."""
    fields = json.loads(_written()) | {"architectures": ["Gemma4ForCausalLM"]} | changes
    return {key: value for key, value in fields.items() if value is not None}


def test_sizes_of_full_layers_in_published_files_and_in_written_ones():
    written = model_config_from_hf(_fields(), "x")
    sizes = {"global_head_dim": 16, "num_global_key_value_heads": 1}
    published = model_config_from_hf(_fields(per_layer_config=None, **sizes), "x")
    assert written == published
    assert written.global_attention == GlobalAttentionConfig(
        num_kv_heads=1, head_dim=16, key_as_value=True
    )
    assert written.layers_with("self_attn") == (0, 2)
    assert written.layers_with("global_attn") == (1, 3)
    # Without shared keys and values the number of heads is that of the other layers.
    separate = _fields(per_layer_config=None, **sizes, attention_k_eq_v=False)
    assert model_config_from_hf(separate, "x").global_attention == GlobalAttentionConfig(
        num_kv_heads=2, head_dim=16, key_as_value=False
    )


@pytest.mark.parametrize(
    "layer_types", [None, ["sliding_attention", "full_attention"] + ["sliding_attention"] * 6]
)
def test_the_last_layer_has_full_attention_whatever_the_file_names(layer_types):
    fields = _fields(num_hidden_layers=8, layer_types=layer_types, per_layer_config=None)
    given = {key: value for key, value in fields.items() if key != "architectures"}
    expected = transformers.Gemma4TextConfig(**given).layer_types
    assert expected[-1] == "full_attention" and expected.count("full_attention") == 2
    assert model_config_from_hf(fields, "x").layer_types == tuple(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**SMALL, "vocab_size_per_layer_input": 32},
            "vocab_size_per_layer_input: 32 is not vocab",
        ),
        (
            {**SMALL, "vocab_size_per_layer_input": None},
            "vocab_size_per_layer_input: 262144 is not",
        ),
        ({**SMALL, "hidden_size_per_layer_input": -1}, "hidden_size_per_layer_input: must be pos"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers: each kind of attention must be that"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers: each kind of attention must be that"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers: each kind of attention must be that"),
        ({"enable_moe_block": True}, "enable_moe_block: True is not supported"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention: 'all' is not"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types: must name both full and sliding"),
        ({"per_layer_config": {"1": {"head_dim": 16}}}, "per_layer_config: must have the same"),
        ({"per_layer_config": {"x": {}, "3": {}}}, "per_layer_config: must have the same"),
        ({"per_layer_config": {"1": 16, "3": 16}}, "per_layer_config: 1: expected a group"),
        (
            {"per_layer_config": {"1": {"head_dim": 8, "x": 1}, "3": {"head_dim": 8, "x": 1}}},
            "per_layer_config: x is not supported",
        ),
    ],
)
def test_fields_that_are_not_computed_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        model_config_from_hf(_fields(**changes), "config.json")
    assert message in str(error.value)


def test_sizes_of_small_models():
    small = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    config = model_config_from_hf(_fields(**SMALL, **small), "x")
    assert (config.num_reader_layers, config.layer_embedding_width) == (2, 6)
    assert config.reader_ffn_width == 2 * config.intermediate_size
    # As in transformers, the FFN is wider in layers without keys and values of their own only.
    alone = model_config_from_hf(_fields(use_double_wide_mlp=True), "x")
    assert not alone.has_wide_ffn and not alone.has_readers
    # A file that does not say so has embeddings of 256 channels for each layer.
    default = _fields(hidden_size_per_layer_input=None, vocab_size=262_144)
    assert model_config_from_hf(default, "x").layer_embedding_width == 256


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2b")
    reference = tiny_model("gemma4_text", **E2B)
    reference.save_pretrained(folder)
    return folder, reference


def test_keys_and_values_that_no_layer_reads_are_left_out(small, tmp_path):
    """The published files have them for all layers."""
    folder, reference = small
    shutil.copytree(folder, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    attention, extra = "model.layers.3.self_attn", np.ones((16, 32), np.float32)
    keys = {f"{attention}.k_proj.weight": extra, f"{attention}.k_norm.weight": extra[:, 0]}
    save_file({**load_file(file), **keys}, file)
    base = moe_jax.load_base(tmp_path / "base")
    with torch.no_grad():
        expected = reference(torch.tensor(TOKENS)).logits.numpy()
    found = moe_jax.AdaptedModel(base, {})(TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_LOGITS)
    lines = moe_jax.describe_base(tmp_path / "base").lines()
    assert "not read   layers.3 (2 tensors), as no part of the model" in lines
    assert any(line.startswith("global     in 2 of 4 layers: 4 of 16") for line in lines)
    assert "key-values the last 2 of 4 layers have those of earlier layers" in lines
    assert "embeddings of width 6 for each layer too" in lines
    assert "ffn        width 48, gelu_pytorch_tanh; 96 in 2 of 4" in lines
    # In a layer that has its own they are needed.
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.1\.self_attn\.k_proj"):
        moe_jax.load_base(tmp_path / "base")


def test_what_does_not_fit_small_models_is_refused(small):
    base = moe_jax.load_base(small[0])
    pair = {"rank": 2, "alpha": 2.0}
    lora = LoraConfig(**pair, target_modules=("per_layer_input_gate",))
    lora.check_model(base.config)
    with pytest.raises(ConfigError, match="target_modules: per_layer_input_gate are projections"):
        lora.check_model(model_config_from_hf(_fields(), "x"))
    with pytest.raises(ConfigError, match="new_tokens: the base, of type 'gemma4_text', also has"):
        dataclasses.replace(lora, new_tokens=("<x>",)).check_model(base.config)
    mixlora = MixLoraConfig(**pair, num_experts=2, target_modules=("up_proj",))
    with pytest.raises(ConfigError, match=r"experts need FFNs of one width, .* of 48 and 96 chan"):
        mixlora.check_model(base.config)
    mixlora.check_model(dataclasses.replace(base.config, reader_ffn_width=None))
    with pytest.raises(ConfigError, match="layers are of several kinds, which the server does"):
        open_models(small[0], {}, dtype="float32")


def test_experts_on_attention_are_refused():
    mola = MolaConfig(rank=2, alpha=2.0, num_experts=(2,), target_modules=("q_proj", "up_proj"))
    with pytest.raises(ConfigError, match="target_modules: experts on q_proj need attention of"):
        mola.check_model(model_config_from_hf(_fields(), "x"))


def test_the_language_model_inside_published_checkpoints(tmp_path):
    """In them it is beside towers for images and audio, and its fields are a group."""
    text = transformers.Gemma4TextConfig(**{**TINY_SIZES, **E2B, "pad_token_id": 0})
    tokens = {"image_token_id": 60, "video_token_id": 61, "audio_token_id": 62}
    config = transformers.Gemma4Config(
        text_config=text, vision_config=None, audio_config=None, **tokens
    )
    torch.manual_seed(0)
    reference = transformers.Gemma4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            center = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(center + 0.15 * torch.randn_like(parameter))
        expected = reference(torch.tensor(TOKENS % 60)).logits.numpy()
    reference.save_pretrained(tmp_path)
    base = moe_jax.load_base(tmp_path)
    assert base.config.num_reader_layers == 2
    found = moe_jax.AdaptedModel(base, {})(TOKENS % 60)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_LOGITS)
