"""The mixlora package reads exported adapters and computes equal logits."""

import json

import numpy as np
import pytest
from foreign_adapters import FFN, MIXLORA, mixlora_logits, random_adapter
from tolerances import FLOAT32_LOGITS

import moe_jax


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(MIXLORA, id="attention and FFN"),
        # Without attention, only the experts have settings.
        pytest.param(
            {**MIXLORA, "target_modules": FFN[:2], "expert_lora": {"rank": 2, "alpha": 6.0}},
            id="gate and up, experts of another rank",
        ),
        pytest.param({**MIXLORA, "rslora": True, "alpha": 2.0, "dropout": 0.3}, id="rsLoRA"),
    ],
)
def test_equal_logits(tiny, tmp_path, method):
    adapter = random_adapter(method, tiny.base.config, str(tiny.folder))
    moe_jax.export_adapter(adapter, "mixlora", tmp_path / "out")
    expected = tiny.with_adapter(adapter)
    assert np.abs(expected - tiny.logits).max() > 1.0
    # The package keeps dropout on, so the exported rate has to be negligible.
    actual = mixlora_logits(tmp_path / "out", tiny.tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32_LOGITS)


def test_bfloat16_is_read_exactly(tiny, tmp_path):
    adapter = random_adapter(MIXLORA, tiny.base.config, str(tiny.folder))
    moe_jax.export_adapter(adapter, "mixlora", tmp_path / "out", dtype="bfloat16")
    imported = moe_jax.import_adapter(tmp_path / "out", tiny.base)
    actual = mixlora_logits(tmp_path / "out", tiny.tokens)
    np.testing.assert_allclose(actual, tiny.with_adapter(imported), rtol=0, atol=FLOAT32_LOGITS)


def test_the_path_of_the_base_can_be_replaced(tiny, tmp_path):
    adapter = random_adapter(MIXLORA, tiny.base.config, "/gone")
    moe_jax.export_adapter(adapter, "mixlora", tmp_path / "out", base="owner/name")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
