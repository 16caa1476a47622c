"""Adapters written by MoE-PEFT: equal logits after import, equal tensors after export."""

import json

import numpy as np
import pytest
import torch
from foreign_adapters import require_same_bits
from moe_peft_oracle import BASE, load_case
from safetensors.numpy import save_file
from tolerances import FLOAT32_LOGITS

import moe_jax

CASES = ("lora", "mixlora", "mixlora-dynamic", "mixlora-switch", "loramoe", "mola")


@pytest.fixture(scope="module")
def base():
    return moe_jax.load_base(BASE)


def write(case, folder):
    """Writes the adapter as MoE-PEFT does."""
    folder.mkdir()
    config = {**case.config, "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({k: torch.tensor(w) for k, w in case.weights.items()}, folder / "adapter_model.bin")
    return folder


def logits(base, adapter, case):
    return np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(case["full/tokens"], "x"))


@pytest.mark.parametrize("name", CASES)
def test_import_keeps_logits_and_export_keeps_bits(name, base, tmp_path):
    case = load_case(name)
    adapter = moe_jax.import_adapter(write(case, tmp_path / "in"), base)
    np.testing.assert_allclose(
        logits(base, adapter, case), case["full/logits"], rtol=0, atol=FLOAT32_LOGITS
    )

    moe_jax.export_adapter(adapter, "mixlora", tmp_path / "out")
    written = torch.load(tmp_path / "out" / "adapter_model.bin", weights_only=True)
    assert written.keys() == case.weights.keys()
    for key, weight in case.weights.items():
        np.testing.assert_array_equal(written[key].numpy(), weight, err_msg=key, strict=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    for field, value in case.config.items():
        assert not value or config[field] == value, field
    require_same_bits(moe_jax.import_adapter(tmp_path / "out", base), adapter)


def test_the_cases_differ_from_the_base(base):
    tokens = load_case("lora")["full/tokens"]
    alone = np.asarray(moe_jax.AdaptedModel(base, {})(tokens))
    for name in CASES:
        assert np.abs(load_case(name)["full/logits"] - alone).max() > 0.1, name


def test_dora_has_magnitudes_in_peft_but_not_in_moe_peft(base, tmp_path):
    case = load_case("dora")
    config = {**case.config, "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = {
        key.replace(".magnitude", ".lora_magnitude_vector"): np.ascontiguousarray(weight)
        for key, weight in case.weights.items()
    }
    weights = {
        key if key.startswith("base_model.") else f"base_model.model.model.{key}": weight
        for key, weight in weights.items()
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    adapter = moe_jax.import_adapter(tmp_path, base)
    np.testing.assert_allclose(
        logits(base, adapter, case), case["full/logits"], rtol=0, atol=FLOAT32_LOGITS
    )

    without = {key: torch.tensor(w) for key, w in weights.items() if "magnitude" not in key}
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(without, tmp_path / "adapter_model.bin")
    with pytest.raises(moe_jax.UserError, match=r"no magnitudes.* set use_dora to false"):
        moe_jax.import_adapter(tmp_path, base)
