"""A family defined in one file outside of the package."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from hf_models import tiny_model
from safetensors.numpy import save_file
from tolerances import FLOAT32_LOGITS

from moe_jax.config.model import ComputeConfig
from moe_jax.errors import CheckpointError
from moe_jax.hf.config import model_config_from_hf, read_model_config
from moe_jax.hf.families import FAMILIES, model_family
from moe_jax.hf.key_table import hf_tensors
from moe_jax.hf.load import load_base_params
from moe_jax.models.causal_lm import LlamaForCausalLM

# A Qwen3 by other names: fields and tensors are renamed, and two projections stored as one.
FAMILY = '''
"""Quill: tensors under `decoder`, and up and gate in one, in this order."""

from moe_jax.hf.families import model_family
from moe_jax.hf.fields import supported_activation
from moe_jax.hf.families.family import WeightRule
from moe_jax.config.model import ModelConfig
from moe_jax.config.rope import RopeConfig

NAMES = {
    "attention.q": ("self_attn/q_proj", "DQ"),
    "attention.k": ("self_attn/k_proj", "DK"),
    "attention.v": ("self_attn/v_proj", "DK"),
    "attention.out": ("self_attn/o_proj", "QD"),
    "ffn.down": ("mlp/down_proj", "FD"),
}
NORMS = {
    "norm_1": ("input_layernorm", "D"),
    "norm_2": ("post_attention_layernorm", "D"),
    "attention.q_norm": ("self_attn/q_norm", "W"),
    "attention.k_norm": ("self_attn/k_norm", "W"),
}
BLOCK = "decoder.{layer}."
WEIGHTS = (
    WeightRule("tokens", "embed_tokens/embedding", "VD"),
    *(
        WeightRule(BLOCK + name, f"layers/{path}/kernel", axes, True)
        for name, (path, axes) in NAMES.items()
    ),
    *(
        WeightRule(BLOCK + name, f"layers/{path}/scale", axes)
        for name, (path, axes) in NORMS.items()
    ),
    WeightRule(BLOCK + "ffn.up_gate", "layers/mlp/up_proj/kernel", "DF", True, "FF", 0),
    WeightRule(BLOCK + "ffn.up_gate", "layers/mlp/gate_proj/kernel", "DF", True, "FF", 1),
    WeightRule("norm", "norm/scale", "D"),
    WeightRule("head", "lm_head/kernel", "DV", True),
)


@model_family("quill", "QuillForCausalLM", weights=WEIGHTS, defaults={"rope_theta": 10000.0})
def read_quill(fields):
    width, heads = fields.get("width", int), fields.get("heads", int)
    return ModelConfig(
        vocab_size=fields.get("tokens", int),
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=fields.get("depth", int),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        hidden_act=supported_activation(fields, "gate", fields.get("gate", str)),
        max_position_embeddings=fields.get("length", int),
        rms_norm_eps=fields.get("epsilon", float),
        rope=RopeConfig(rope_type="default", rope_theta=fields.get("rope_theta", float)),
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        qk_norm=True,
    )
'''
CONFIG = {
    "architectures": ["QuillForCausalLM"],
    "model_type": "quill",
    "tokens": 64,
    "width": 32,
    "heads": 4,
    "depth": 2,
    "length": 64,
    "epsilon": 1e-5,
    "gate": "silu",
}
RENAMED = {
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.down_proj": "ffn.down",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
}


@pytest.fixture
def quill(tmp_path):
    """The family, imported from a file and unregistered afterwards."""
    with pytest.raises(CheckpointError, match=r"architecture QuillForCausalLM .* not supported"):
        model_config_from_hf(CONFIG, "config.json")
    path = tmp_path / "quill_family.py"
    path.write_text(FAMILY)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield
    del FAMILIES["quill"], sys.modules[path.stem]


def _save(folder) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """A random Qwen3 as a checkpoint of the new family."""
    reference = tiny_model(
        "qwen3",
        num_hidden_layers=2,
        num_key_value_heads=4,
        head_dim=8,
        intermediate_size=128,
        rms_norm_eps=1e-5,
    )
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    tensors = {
        "tokens": state["model.embed_tokens.weight"],
        "norm": state["model.norm.weight"],
        "head": state["lm_head.weight"],
    }
    for layer in range(2):
        old, new = f"model.layers.{layer}.", f"decoder.{layer}."
        tensors |= {new + mine: state[f"{old}{name}.weight"] for name, mine in RENAMED.items()}
        parts = [state[f"{old}mlp.{name}_proj.weight"] for name in ("up", "gate")]
        tensors[f"{new}ffn.up_gate"] = np.concatenate(parts)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return reference, tensors


def test_one_file_outside_the_package_is_enough(quill, tmp_path):
    reference, tensors = _save(tmp_path)
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12))
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"))
    logits = model.apply({"params": params}, tokens)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=FLOAT32_LOGITS)

    back = hf_tensors(params, config)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_its_files_are_as_strict_as_others(quill, tmp_path):
    _, tensors = _save(tmp_path)
    config = read_model_config(tmp_path)
    save_file(tensors | {"decoder.0.gate": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.0\.gate.*type 'quill' has no such"):
        load_base_params(tmp_path, config, "float32")
    with pytest.raises(CheckpointError, match=r"config.json: gate: 'tanh' is not supported"):
        model_config_from_hf(CONFIG | {"gate": "tanh"}, "config.json")
    with pytest.raises(CheckpointError, match=r"config.json: logit_scale: 2.0 is not supported"):
        model_config_from_hf(CONFIG | {"logit_scale": 2.0}, "config.json")


def test_a_model_of_a_family_that_is_not_imported(quill, tmp_path):
    _save(tmp_path)
    config = read_model_config(tmp_path)
    family = FAMILIES.pop("quill")
    with pytest.raises(CheckpointError, match=r"no model family 'quill'.*import the module"):
        load_base_params(tmp_path, config, "float32")
    FAMILIES["quill"] = family


@pytest.mark.parametrize("names", [("llama", "OtherForCausalLM"), ("other", "LlamaForCausalLM")])
def test_names_are_taken_once(names):
    before = dict(FAMILIES)
    with pytest.raises(ValueError, match=r"is taken by moe_jax\.hf\.families\.llama"):
        model_family(*names, weights=(), defaults={})(FAMILIES["llama"].read)
    assert before == FAMILIES
