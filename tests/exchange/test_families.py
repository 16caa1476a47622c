"""Adapters on projections that are not fused, as peft's and merged into their base."""

import numpy as np
import peft
import pytest
import torch
from foreign_adapters import ATTENTION, LORA
from hf_models import tiny_model
from tolerances import FLOAT32_LOGITS
from transformers import AutoModelForCausalLM
from whole_models import adapter_of

import moe_jax

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))
WINDOW = {"sliding_window": 5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}
FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 0.5}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 1000.0}
GRANITE_4 = {
    "layer_types": ["full_attention"] * 3,
    "num_local_experts": 0,
    "shared_intermediate_size": 40,
    "position_embedding_type": "rope",
    "mamba_n_heads": 8,
}
CASES = {
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "olmo2": {},
    "olmo3": WINDOW,
    "ministral3": {"head_dim": 8, "rope_parameters": YARN},
    "granite": {"attention_multiplier": 0.2, **FACTORS},
    "granitemoehybrid": {**GRANITE_4, "attention_multiplier": 0.2, **FACTORS},
    "exaone4": {**WINDOW, "sliding_window_pattern": 2},
    "seed_oss": {"head_dim": 12},
    "cohere2": {**WINDOW, "sliding_window_pattern": 2, "logit_scale": 1.5},
    "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": ALPHA},
}


def _logits(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("model_type", CASES)
def test_exports_have_the_logits_of_the_adapter(model_type, tmp_path):
    reference = tiny_model(model_type, **CASES[model_type])
    reference.save_pretrained(tmp_path / "base")
    base = moe_jax.load_base(tmp_path / "base")
    # The FFN of Granite 4 is stored under other names.
    method = LORA | ({"target_modules": ATTENTION} if model_type == "granitemoehybrid" else {})
    adapter = adapter_of(base, method)
    expected = np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(TOKENS, "x"))
    assert np.abs(expected - _logits(reference)).max() > 0.3

    moe_jax.export_adapter(adapter, "llama", tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    np.testing.assert_allclose(_logits(merged), expected, rtol=0, atol=FLOAT32_LOGITS)
    assert moe_jax.load_base(tmp_path / "merged").config == base.config

    moe_jax.export_adapter(adapter, "peft", tmp_path / "peft")
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path / "peft"))
    np.testing.assert_allclose(_logits(adapted), expected, rtol=0, atol=FLOAT32_LOGITS)
