"""Adapters of peft on some modules, of several sizes, and of other names: its own logits."""

from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from foreign_adapters import peft_logits
from hf_models import save_tiny_llama, tiny_llama, tiny_model
from safetensors.torch import load_file, save_file
from tolerances import FLOAT32_LOGITS_OF_LARGEST
from transformers import PreTrainedModel

import moe_jax
from moe_jax.checkpoints.leaves import named_leaves

TARGETS = ["q_proj", "v_proj", "up_proj"]
SIZES = {
    "target_modules": TARGETS,
    "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 2},
    "alpha_pattern": {"v_proj": 3, "^model.layers.0.self_attn.q_proj": 11},
}
CASES: dict[str, dict[str, Any]] = {
    "pattern": {"target_modules": r".*layers\.[02]\..*\.q_proj"},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["1.mlp.up_proj", "q_proj"]},
    "excluded_pattern": {"target_modules": TARGETS, "exclude_modules": r".*\.1\..*"},
    "paths": {"target_modules": ["model.layers.1.self_attn.v_proj", "2.mlp.down_proj", "fc1"]},
    "sizes": SIZES,
    "sizes_rslora": {**SIZES, "use_rslora": True},
    "sizes_dora": {**SIZES, "use_dora": True},
    "layers_dora": {"target_modules": TARGETS, "use_dora": True, "layers_to_transform": [1]},
    "transposed": {"fan_in_fan_out": True},
    "no_biases": {"bias": "lora_only"},
    "minor_components": {"init_lora_weights": "mica"},
}
FUSED_CASES = {
    "fused": {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
    "fused_dora": {
        "target_modules": ["qkv_proj", "gate_up_proj"],
        "layers_to_transform": [0, 2],
        "rank_pattern": {"0.self_attn.qkv_proj": 6},
        "use_dora": True,
    },
}


class Trained(NamedTuple):
    """A model of peft, its logits, and those of its base."""

    model: peft.PeftModel
    logits: np.ndarray
    base_logits: np.ndarray


def trained(model: PreTrainedModel, tokens: np.ndarray, **settings: Any) -> Trained:
    """A model of peft with large random pairs, rank 3 by default."""
    fields = {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**fields, **settings})).eval()
    with torch.no_grad():
        base_logits = adapted.get_base_model()(torch.tensor(tokens)).logits.numpy()
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.3)
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        with adapted.disable_adapter():
            base_logits = adapted(torch.tensor(tokens)).logits.numpy()
        logits = adapted(torch.tensor(tokens)).logits.numpy()
    return Trained(adapted, logits, base_logits)


def require_equal(actual: np.ndarray, expected: Trained) -> None:
    assert np.abs(expected.logits - expected.base_logits).max() > 0.5
    atol = FLOAT32_LOGITS_OF_LARGEST * np.abs(expected.logits).max()
    np.testing.assert_allclose(actual, expected.logits, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_equal_logits(tiny, tmp_path, case: str):
    expected = trained(tiny_llama(), tiny.tokens, **CASES[case])
    expected.model.save_pretrained(tmp_path)
    require_equal(tiny.with_adapter(moe_jax.import_adapter(tmp_path, tiny.base)), expected)


@pytest.mark.parametrize("case", FUSED_CASES)
def test_pairs_on_fused_projections(tmp_path, case: str):
    model = tiny_model("phi3")
    model.save_pretrained(tmp_path / "base")
    base = moe_jax.load_base(tmp_path / "base")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12))
    expected = trained(model, tokens, **FUSED_CASES[case])
    expected.model.save_pretrained(tmp_path / "adapter")
    adapter = moe_jax.import_adapter(tmp_path / "adapter", base)
    actual = np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(tokens, "x"))
    require_equal(actual, expected)


def test_absent_pairs_are_zeros_and_smaller_ones_are_padded(tiny, tmp_path):
    model = trained(
        tiny_llama(),
        tiny.tokens,
        layers_to_transform=[0, 2],
        rank_pattern={"2.self_attn.q_proj": 5},
    ).model
    model.save_pretrained(tmp_path)
    adapter = moe_jax.import_adapter(tmp_path, tiny.base)
    assert (adapter.method.rank, adapter.method.alpha) == (5, 6.0)
    leaves = named_leaves(adapter.tree)
    a, b = (np.asarray(leaves[f"layers/self_attn/q_proj/lora_{side}"]) for side in "AB")
    assert not a[1].any() and not b[1].any()
    assert not a[0, :, 3:].any() and not b[0, 3:].any()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    np.testing.assert_array_equal(a[0, :, :3], layer.lora_A.default.weight.detach().T)
    # Scale 6 / 3 in peft, and 6 / 5 here.
    scaled = layer.lora_B.default.weight.detach().T * np.float32(5 / 3)
    np.testing.assert_array_equal(b[0, :3], scaled)


@pytest.mark.parametrize("kind", ["named", "doubled", "compiled", "decoder"])
def test_other_names_of_the_tensors(tiny, tmp_path, kind: str):
    """Of a state dict of peft's model, and of adapters on adapted, compiled and headless models."""
    named, prefix = kind == "named", "base_model.model."
    expected = trained(tiny_llama(), tiny.tokens, use_dora=True)
    expected.model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if named:
        state = expected.model.state_dict()
        tensors = {name: t.contiguous() for name, t in state.items() if "lora_" in name}
        assert any(name.endswith("q_proj.lora_A.default.weight") for name in tensors)
    else:
        start = {"doubled": 2 * prefix, "compiled": f"{prefix}_orig_mod.", "decoder": prefix}[kind]
        former = f"{prefix}model." if kind == "decoder" else prefix
        tensors = {name.replace(former, start): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    if named:  # peft reads them too
        read_by_peft = peft_logits(tiny_llama(), tmp_path, tiny.tokens)
        np.testing.assert_array_equal(read_by_peft, expected.logits)
    require_equal(tiny.with_adapter(moe_jax.import_adapter(tmp_path, tiny.base)), expected)
    pairs = {name: tensor.clone() for name, tensor in tensors.items() if "lora_A" in name}
    old, new = (".default.", ".other.") if named else (".weight", ".other.weight")
    save_file({**tensors, **{name.replace(old, new): t for name, t in pairs.items()}}, file)
    with pytest.raises(moe_jax.UserError, match="holds several adapters, for example"):
        moe_jax.import_adapter(tmp_path, tiny.base)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head'] adds trained weights of "),
        ({"trainable_token_indices": [3, 5]}, "trainable_token_indices: [3, 5] adds trained rows"),
        ({"lora_bias": True}, "lora_bias: True adds trained biases of the pairs, which are not su"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the weights of the base; convert the"),
        ({"init_lora_weights": "olora"}, "'olora' changes the weights of the base; convert the"),
        ({"target_modules": ["q_proj", "lm_head"]}, "and 1 more, of an adapted embedding or head"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens'] matches no module of the base, s"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "of an adapted embedding or head, which"),
    ],
)
def test_more_than_pairs_is_refused_for_its_true_reason(tiny, tmp_path, settings, words: str):
    trained(tiny_llama(), tiny.tokens, **settings).model.save_pretrained(tmp_path)
    require_refusal(tmp_path, tiny.base, words)


def require_refusal(folder, base, words: str) -> None:
    with pytest.raises(moe_jax.UserError) as error:
        moe_jax.import_adapter(folder, base)
    message = str(error.value)
    assert words in message and "\n" not in message
    assert "incomplete" not in message and "another base" not in message
    assert "lora_bias" in message or "with peft" in message or "matches no module" in message


def test_trained_biases_are_refused(tiny, tmp_path):
    model = save_tiny_llama(tmp_path / "base", attention_bias=True)
    trained(model, tiny.tokens, bias="all").model.save_pretrained(tmp_path / "adapter")
    require_refusal(
        tmp_path / "adapter",
        tmp_path / "base",
        "_proj.bias and 10 more, a trained bias, which is n",
    )


def test_a_resized_vocabulary_is_refused(tiny, tmp_path):
    model = tiny_llama()
    model.resize_token_embeddings(100)
    adapted = trained(model, tiny.tokens).model
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    words = "embed_tokens.weight, trained as a whole or saved with a resized vocabulary, which is"
    require_refusal(tmp_path, tiny.base, words)


def test_a_converted_pissa_has_equal_logits(tiny, tmp_path):
    """The adapter that the message advises to write."""
    torch.manual_seed(1)
    fields = {"target_modules": ["q_proj"], "r": 3, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(init_lora_weights="pissa", **fields))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        logits = model.eval()(torch.tensor(tiny.tokens)).logits.numpy()
    model.save_pretrained(
        tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    adapter = moe_jax.import_adapter(tmp_path / "out", tiny.base)
    assert adapter.method.rank == 6
    require_equal(tiny.with_adapter(adapter), Trained(model, logits, tiny.logits))
