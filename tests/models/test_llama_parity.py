"""Logits of Llama against transformers, through a saved checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import save_tiny_llama
from tolerances import FLOAT32_LOGITS

from moe_jax.config.model import ComputeConfig
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.models.causal_lm import LlamaForCausalLM

LENGTH = 24

VARIANTS = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "no_grouping": {"num_key_value_heads": 6},
    "one_kv_head": {"num_key_value_heads": 1},
    "odd_head_dim": {"head_dim": 14},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "dynamic": {
        "max_position_embeddings": 16,  # shorter than the rows, so that the base is rescaled
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


def _rows(padding: str) -> tuple[np.ndarray, np.ndarray]:
    """Three rows of tokens and their masks: full, two thirds, one third."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 96, (3, LENGTH))
    lengths = np.array([LENGTH, 16, 8])[:, None]
    index = np.arange(LENGTH)[None]
    mask = index < lengths if padding == "right" else index >= LENGTH - lengths
    return tokens, mask


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant, padding):
    reference = save_tiny_llama(tmp_path, **VARIANTS[variant])
    tokens, mask = _rows(padding)
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        expected = reference(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions),
        ).logits.numpy()

    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"))
    logits = model.apply({"params": params}, tokens, segment_ids=jnp.asarray(mask, jnp.int32))

    np.testing.assert_allclose(
        np.asarray(logits)[mask], expected[mask], rtol=0, atol=FLOAT32_LOGITS
    )
    if padding == "right":
        # Without segment ids causality alone hides what stands on the right.
        alone = model.apply({"params": params}, tokens, positions=jnp.asarray(positions))
        np.testing.assert_allclose(
            np.asarray(alone)[mask], expected[mask], rtol=0, atol=FLOAT32_LOGITS
        )


def test_packed_sequences_do_not_attend_to_each_other(tmp_path):
    save_tiny_llama(tmp_path)
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"))
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 96, (1, 10)), rng.integers(0, 96, (1, 6))
    packed = np.concatenate([first, second, np.zeros((1, 4), int)], axis=1)
    segment_ids = jnp.asarray([[1] * 10 + [2] * 6 + [0] * 4])

    together = model.apply({"params": params}, packed, segment_ids=segment_ids)
    alone = [model.apply({"params": params}, row) for row in (first, second)]

    np.testing.assert_allclose(together[:, :10], alone[0], rtol=0, atol=FLOAT32_LOGITS)
    np.testing.assert_allclose(together[:, 10:16], alone[1], rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32_and_gives_float32_logits(tmp_path, dtype):
    save_tiny_llama(tmp_path)
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    tokens = np.random.default_rng(3).integers(0, 96, (2, LENGTH))
    logits = {
        name: LlamaForCausalLM(config, ComputeConfig(dtype=name)).apply({"params": params}, tokens)
        for name in ("float32", dtype)
    }
    assert logits[dtype].dtype == jnp.float32
    error = jnp.linalg.norm(logits[dtype] - logits["float32"]) / jnp.linalg.norm(logits["float32"])
    # Two to three roundings a layer of 2^-8 (bfloat16) or 2^-11 (float16), relative.
    assert 0 < float(error) < {"bfloat16": 3e-2, "float16": 4e-3}[dtype]


@pytest.mark.parametrize("remat", ["dots", "frozen", "full"])
def test_rematerialization_changes_no_gradient(tmp_path, remat):
    save_tiny_llama(tmp_path)
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    tokens = np.random.default_rng(4).integers(0, 96, (2, LENGTH))

    def gradient(policy):
        model = LlamaForCausalLM(config, ComputeConfig(dtype="float32", remat=policy))
        loss = lambda p: jnp.mean(jnp.square(model.apply({"params": p}, tokens)))
        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient(remat),
        gradient("none"),
    )
