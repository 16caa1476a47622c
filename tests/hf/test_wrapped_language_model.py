"""Language models inside models that read images, against transformers' whole models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tolerances import FLOAT32_LOGITS, FLOAT32_LOGITS_OF_LARGEST
from transformers import (
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from whole_models import adapter_of

import moe_jax
from moe_jax.cli import main
from moe_jax.config.command_line import load_config_file
from moe_jax.errors import CheckpointError
from moe_jax.hf.base_model import open_base
from moe_jax.hf.config import model_config_from_hf, read_model_config

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS = np.random.default_rng(0).integers(0, 59, (2, 16))
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA = {
    "text_config": {
        **TEXT,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
    "image_token_index": 60,
}
MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}
MROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]}
IMAGE_IDS = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
WRAPPERS = {
    "gemma3": (Gemma3ForConditionalGeneration, Gemma3Config(**GEMMA)),
    "mistral3": (
        Mistral3ForConditionalGeneration,
        Mistral3Config(
            text_config={"model_type": "mistral", **TEXT},
            vision_config={"model_type": "pixtral", **VISION, "head_dim": 8},
            image_token_index=60,
            tie_word_embeddings=False,
        ),
    ),
    "ministral3": (
        Mistral3ForConditionalGeneration,
        Mistral3Config(
            text_config={"model_type": "ministral3", **TEXT, "rope_parameters": MINISTRAL_ROPE},
            vision_config={"model_type": "pixtral", **VISION, "head_dim": 8},
            image_token_index=60,
            tie_word_embeddings=False,
        ),
    ),
    "cohere2_vision": (
        Cohere2VisionForConditionalGeneration,
        Cohere2VisionConfig(
            text_config={
                **TEXT,
                "model_type": "cohere2",
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "pad_token_id": 0,
                "logit_scale": 1.0,  # transformers' whole model does not apply it
            },
            vision_config={"model_type": "siglip_vision_model", **VISION},
            image_token_id=60,
        ),
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": MROPE},
            vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32},
            tie_word_embeddings=True,
            **IMAGE_IDS,
        ),
    ),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig(
            text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
            vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32},
            **IMAGE_IDS,
        ),
    ),
    "llava": (
        LlavaForConditionalGeneration,
        LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_index=60,
        ),
    ),
    "qwen3_5": (
        Qwen3_5ForConditionalGeneration,
        Qwen3_5Config(
            text_config={
                **TEXT,
                "num_hidden_layers": 4,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                    "mrope_section": [1, 0, 0],
                },
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "depth": 1,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 4,
            },
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        ),
    ),
}


def saved(folder, name, **changes):
    """A random model with all parameters distinct, also written to `folder`."""
    cls, config = WRAPPERS[name]
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    change_config(folder, **changes)
    return model


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def rename(folder, change):
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


def later_name(name):
    """Name in the layout `model.language_model.`, in which the head is outside."""
    head = name.removeprefix("language_model.")
    if head.startswith("lm_head"):
        return head
    inner = name.replace("language_model.model.", "language_model.")
    return inner if inner.startswith("model.") else f"model.{inner}"


LAYOUTS = ("language_model.model.", "model.language_model.")


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in ("gemma3", "mistral3", "llava") for layout in LAYOUTS]
    + [(name, None) for name in ("ministral3", "cohere2_vision", "qwen2_5_vl", "qwen3_vl")]
    + [("qwen3_5", "model.language_model.")],
)
def test_text_has_the_logits_of_the_whole_model(name, layout, tmp_path):
    model = saved(tmp_path, name)
    if layout == "model.language_model.":
        rename(tmp_path, later_name)
    assert layout is None or any(
        key.startswith(layout) for key in load_file(tmp_path / "model.safetensors")
    )
    base = moe_jax.load_base(tmp_path)
    found = np.asarray(moe_jax.AdaptedModel(base, {})(TOKENS))
    np.testing.assert_allclose(found, logits(model), rtol=0, atol=FLOAT32_LOGITS)


def test_what_is_left_out_is_named(tmp_path, capsys):
    saved(tmp_path, "gemma3")
    stored = load_file(tmp_path / "model.safetensors")
    vision = sum(key.startswith("vision_tower.") for key in stored)
    left_out = f"multi_modal_projector (2 tensors), vision_tower ({vision} tensors)"
    note = open_base(tmp_path).unread_note
    assert note == f"not read from {tmp_path}, as no part of the model: {left_out}"
    assert main(["inspect", "--base", str(tmp_path)]) == 0
    assert f"not read   {left_out}, as no part of the model" in capsys.readouterr().out


def test_unknown_tensors_of_the_language_model_are_refused(tmp_path):
    saved(tmp_path, "gemma3")
    rename(tmp_path, lambda name: name.replace("layers.1.mlp.gate_proj", "layers.1.mlp.w1"))
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.1\.mlp\.gate_proj"):
        moe_jax.load_base(tmp_path)
    saved(tmp_path, "gemma3")
    file = tmp_path / "model.safetensors"
    for prefix in ("language_model.model.", "model.language_model."):
        extra = {f"{prefix}layers.1.mlp.router.weight": torch.ones(2)}
        save_file(load_file(file) | extra, file)
        with pytest.raises(CheckpointError, match=r"hold model\.layers\.1\.mlp\.router\.weight, "):
            moe_jax.load_base(tmp_path)
        saved(tmp_path, "gemma3")


# Published files, whose groups leave out what equals the defaults of their class.
PUBLISHED = {
    "gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "gemma-3-27b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "model_type": "gemma3_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 62,
            "num_key_value_heads": 16,
            "query_pre_attn_scalar": 168,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "llava-1.5-7b-hf": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "tie_word_embeddings": False,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "vocab_size": 32064,
        },
    },
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_omitted_fields_are_those_of_transformers(name):
    fields = PUBLISHED[name]
    whole = transformers.AutoConfig.for_model(**fields)
    # transformers' complete fields, as the file of a language model of its own.
    complete = whole.text_config.to_dict()
    complete["tie_word_embeddings"] = whole.tie_word_embeddings
    complete["architectures"] = None
    assert model_config_from_hf(fields, "c") == model_config_from_hf(complete, "c")


def test_the_shipped_plan_of_gemma_3_4b_is_the_published_model():
    hf_config = load_config_file(str(CONFIGS / "gemma3_4b_mixlora.py"))["base"]["hf_config"]
    published = model_config_from_hf(PUBLISHED["gemma-3-4b-it"], "c")
    assert model_config_from_hf(hf_config, "c") == published


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "glm4v_text"}, r"c: text_config\.model_type: .*'glm4v_text' is not"),
        ({"model_type": None}, r"c: text_config\.model_type: a language model of type None"),
        ({"hidden_size": "wide"}, r"c: text_config: "),
        ({"num_attention_heads": 3}, r"c: text_config: "),
        ({"use_bidirectional_attention": True}, r"c: text_config: use_bidirectional_attention: "),
    ],
)
def test_refusals_are_one_line(fields, words):
    whole = PUBLISHED["gemma-3-4b-it"]
    changed = whole | {"text_config": whole["text_config"] | fields}
    with pytest.raises(CheckpointError, match=words) as caught:
        model_config_from_hf(changed, "c")
    assert "\n" not in str(caught.value)


def test_wrappers_with_other_attention_or_quantized_weights_are_refused():
    whole = PUBLISHED["gemma-3-4b-it"]
    with pytest.raises(CheckpointError, match="c: model_type 'paligemma' is not supported"):
        model_config_from_hf(whole | {"model_type": "paligemma"}, "c")
    with pytest.raises(CheckpointError, match="quantized checkpoints are not supported"):
        model_config_from_hf(whole | {"quantization_config": {"quant_method": "awq"}}, "c")


def test_a_published_file_without_a_group(tmp_path):
    """Fields and tensors of Qwen2.5-VL as its authors wrote them."""
    model = saved(tmp_path, "qwen2_5_vl")
    grouped = read_model_config(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    text = fields.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {key: value for key, value in text.items() if key in {*TEXT, "rms_norm_eps"}}
    flat |= {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "rope_theta": rope["rope_theta"],
        "tie_word_embeddings": True,
        "vision_config": fields["vision_config"],
    }
    (tmp_path / "config.json").write_text(json.dumps(flat))
    rename(
        tmp_path,
        lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "v."),
    )
    assert read_model_config(tmp_path) == grouped and grouped.model_type == "qwen2"
    base = moe_jax.load_base(tmp_path)
    found = np.asarray(moe_jax.AdaptedModel(base, {})(TOKENS))
    np.testing.assert_allclose(found, logits(model), rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen3_vl"])
def test_an_export_is_a_text_model(name, tmp_path, monkeypatch):
    saved(tmp_path / "base", name, eos_token_id=[1, 7])
    base = moe_jax.load_base(tmp_path / "base")
    method = {"name": "lora", "rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]}
    adapter = adapter_of(base, method)
    with pytest.raises(CheckpointError, match=r"base: is a language model inside .* --to llama"):
        moe_jax.export_adapter(adapter, "peft", tmp_path / "out")
    with monkeypatch.context() as cache:  # a hub id
        cache.setattr(
            "huggingface_hub.try_to_load_from_cache",
            lambda _, file, revision: str(tmp_path / "base" / file),
        )
        with pytest.raises(CheckpointError, match="owner/name: is a language model inside"):
            moe_jax.export_adapter(adapter, "peft", tmp_path / "out", base="owner/name")
    notes = moe_jax.export_adapter(adapter, "llama", tmp_path / "out")
    vision = "visual" if name == "qwen3_vl" else "vision_tower"
    assert any(vision in note for note in notes)
    assert read_model_config(tmp_path / "out") == base.config
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()) and "ForCausalLM" in type(model).__name__
    assert model.config.eos_token_id == [1, 7]
    adapted = np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(TOKENS, "x"))
    np.testing.assert_allclose(logits(model), adapted, rtol=0, atol=FLOAT32_LOGITS)
    plain = np.asarray(moe_jax.AdaptedModel(base, {})(TOKENS))
    assert np.abs(adapted - plain).max() > 0.01


def test_peft_reads_an_adapter_of_a_model_that_transformers_loads_alone(tmp_path):
    saved(tmp_path / "base", "qwen3_5")
    base = moe_jax.load_base(tmp_path / "base")
    targets = ["q_proj", "in_proj_qkv", "out_proj", "down_proj"]
    adapter = adapter_of(base, {"name": "lora", "rank": 2, "alpha": 4.0, "target_modules": targets})
    moe_jax.export_adapter(adapter, "peft", tmp_path / "out")
    text_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = logits(peft.PeftModel.from_pretrained(text_model, str(tmp_path / "out")).eval())
    adapted = np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(TOKENS, "x"))
    np.testing.assert_allclose(found, adapted, rtol=0, atol=FLOAT32_LOGITS)
    plain = np.asarray(moe_jax.AdaptedModel(base, {})(TOKENS))
    assert np.abs(adapted - plain).max() > 0.1


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], r".*language_model.*\.(q_proj|down_proj)"]
)
def test_adapters_that_peft_trained_on_the_whole_model(targets, tmp_path):
    model = saved(tmp_path / "base", "gemma3")
    excluded = None if isinstance(targets, str) else r".*vision_tower.*"
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, exclude_modules=excluded)
    adapted: Any = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    base = moe_jax.load_base(tmp_path / "base")
    adapter = moe_jax.import_adapter(tmp_path / "adapter", base)
    found = np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(TOKENS, "x"))
    expected = logits(adapted)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_LOGITS_OF_LARGEST * largest)
    assert np.abs(found - np.asarray(moe_jax.AdaptedModel(base, {})(TOKENS))).max() > 0.1
