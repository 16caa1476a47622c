"""RMS normalization against transformers, and in half precision against float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import ROUNDING
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moe_jax.layers.norm import RMSNorm

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 16)).astype(np.float32) * 5
SCALE = 1 + 0.2 * RNG.standard_normal(16).astype(np.float32)


def _ours(x, dtype, epsilon=1e-5):
    norm = RMSNorm(epsilon, jnp.dtype(dtype), jnp.dtype("float32"))
    return norm.apply({"params": {"scale": jnp.asarray(SCALE)}}, x)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 0.5])
def test_equals_transformers(epsilon):
    reference = LlamaRMSNorm(16, eps=epsilon)
    reference.weight.data = torch.tensor(SCALE)
    expected = reference(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(_ours(X, "float32", epsilon), expected, **ROUNDING)


def test_centered_equals_cohere():
    reference = Cohere2LayerNorm(16, eps=1e-5)
    reference.weight.data = torch.tensor(SCALE)
    expected = reference(torch.tensor(X)).detach().numpy()
    float32 = jnp.dtype("float32")
    norm = RMSNorm(1e-5, float32, float32, centered=True)
    found = norm.apply({"params": {"scale": jnp.asarray(SCALE)}}, X)
    np.testing.assert_allclose(found, expected, **ROUNDING)
    assert np.abs(found - _ours(X, "float32")).max() > 0.01


def test_unit_offset_equals_gemma():
    reference = GemmaRMSNorm(16, eps=1e-5)
    reference.weight.data = torch.tensor(SCALE - 1)
    expected = reference(torch.tensor(X)).detach().numpy()
    float32 = jnp.dtype("float32")
    norm = RMSNorm(1e-5, float32, float32, unit_offset=True)
    stored = {"params": {"scale": jnp.asarray(SCALE - 1)}}
    np.testing.assert_allclose(norm.apply(stored, X), expected, **ROUNDING)
    fresh = nn.meta.unbox(norm.init(jax.random.key(0), X))["params"]["scale"]
    np.testing.assert_array_equal(fresh, np.zeros(16))  # a factor of one


def test_by_hand():
    # The mean square of (3, 4, 0, 0) is 25 / 4, its root 2.5.
    norm = RMSNorm(0.0, jnp.dtype("float32"), jnp.dtype("float32"))
    y = norm.apply(
        {"params": {"scale": jnp.array([1.0, 2.0, 1.0, 1.0])}}, jnp.array([3.0, 4, 0, 0])
    )
    np.testing.assert_allclose(y, [1.2, 3.2, 0.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision_rounds_the_result_only(dtype, bits):
    # 300^2 is beyond float16, so that squares in half precision would be infinite.
    x = jnp.asarray(X * 60, dtype)
    exact = np.asarray(x, np.float64)
    exact = SCALE * exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    y = _ours(x, dtype)
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2.0**-bits * 1.01)
