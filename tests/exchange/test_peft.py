"""PEFT reads exported adapters, and its adapters can be imported, with equal logits."""

import numpy as np
import peft
import pytest
import torch
from foreign_adapters import LORA, peft_logits, random_adapter
from hf_models import tiny_llama
from tolerances import BFLOAT16_TENSORS, FLOAT32_LOGITS
from transformers import LlamaForSequenceClassification

import moe_jax


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(LORA, id="LoRA"),
        pytest.param({**LORA, "rslora": True, "alpha": 2.5}, id="rsLoRA"),
        pytest.param({**LORA, "dora": True}, id="DoRA"),
    ],
)
def test_equal_logits(tiny, tmp_path, method):
    adapter = random_adapter(method, tiny.base.config, str(tiny.folder))
    moe_jax.export_adapter(adapter, "peft", tmp_path / "out")
    expected = tiny.with_adapter(adapter)
    assert np.abs(expected - tiny.logits).max() > 1.0
    actual = peft_logits(tiny.reference, tmp_path / "out", tiny.tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("labels", [3, 1])
def test_classifiers(tiny, tmp_path, labels):
    head = {"labels": ["a", "b", "c"]} if labels > 1 else {"regression": True}
    method = {**LORA, "classification": head}
    adapter = random_adapter(method, tiny.base.config, str(tiny.folder))
    notes = moe_jax.export_adapter(adapter, "peft", tmp_path / "out")
    assert f"num_labels={labels} (" in notes[0]
    base = LlamaForSequenceClassification.from_pretrained(
        tiny.folder, num_labels=labels, pad_token_id=None
    )
    actual = peft_logits(base, tmp_path / "out", tiny.tokens[:1])
    expected = tiny.with_adapter(adapter)
    assert expected.shape == (2, labels) and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(actual, expected[:1], rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_exactly(tiny, tmp_path, dtype):
    adapter = random_adapter(LORA, tiny.base.config, str(tiny.folder), spread=0.07)
    moe_jax.export_adapter(adapter, "peft", tmp_path / "out", dtype=dtype)
    actual = peft_logits(tiny.reference, tmp_path / "out", tiny.tokens)
    imported = tiny.with_adapter(moe_jax.import_adapter(tmp_path / "out", tiny.base))
    np.testing.assert_allclose(actual, imported, rtol=0, atol=FLOAT32_LOGITS)
    whole = tiny.with_adapter(adapter)
    assert np.abs(whole - tiny.logits).max() > 0.3
    np.testing.assert_allclose(actual, whole, rtol=0, atol=BFLOAT16_TENSORS)
    assert np.abs(actual - whole).max() > FLOAT32_LOGITS, "they were rounded"


@pytest.mark.parametrize(
    ("settings", "safe", "targets"),
    [
        ({"lora_alpha": 6, "use_dora": True}, True, ("q_proj", "down_proj")),
        ({"lora_alpha": 3.5, "use_rslora": True, "init_lora_weights": "gaussian"}, False, ()),
    ],
)
def test_import_of_adapters_written_by_peft(tiny, tmp_path, settings, safe, targets):
    """Safetensors with a list of modules, and a pickle with a pattern of names."""
    torch.manual_seed(1)
    modules = list(targets) or r".*(k_proj|up_proj)"
    config = peft.LoraConfig(r=3, target_modules=modules, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.3 * torch.rand_like(parameter))
        expected = model(torch.tensor(tiny.tokens)).logits.numpy()
    model.save_pretrained(tmp_path / "out", safe_serialization=safe)
    adapter = moe_jax.import_adapter(tmp_path / "out", tiny.base)
    assert set(adapter.method.target_modules) == set(targets or ("k_proj", "up_proj"))
    assert np.abs(expected - tiny.logits).max() > 0.5
    np.testing.assert_allclose(tiny.with_adapter(adapter), expected, rtol=0, atol=FLOAT32_LOGITS)
