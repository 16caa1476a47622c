"""Token embedding, language-model head and frozen projection."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import ROUNDING

from moe_jax.layers.frozen import FrozenLinear, storage_of
from moe_jax.layers.vocabulary import LanguageModelHead, TokenEmbedding, logits

RNG = np.random.default_rng(0)


def test_embedding_is_a_look_up():
    table = RNG.standard_normal((10, 4)).astype(np.float32)
    embedding = TokenEmbedding(10, 4, jnp.dtype("bfloat16"), jnp.dtype("float32"))
    x = embedding.apply({"params": {"embedding": table}}, jnp.array([[3, 3, 0], [9, 1, 2]]))
    assert x.dtype == jnp.bfloat16
    expected = table.astype(jnp.bfloat16)[[[3, 3, 0], [9, 1, 2]]]
    np.testing.assert_array_equal(np.asarray(x), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_summed_in_float32(dtype):
    x = jnp.asarray(RNG.standard_normal((2, 3, 256)), dtype)
    kernel = jnp.asarray(RNG.standard_normal((256, 7)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    head = LanguageModelHead(7, 256, jnp.dtype(dtype)).bind({"params": {"kernel": kernel}})
    for ours in (logits(x, head.kernel), logits(x, kernel.T, tied=True)):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("use_bias", [False, True])
def test_the_frozen_projection_equals_pytorchs_with_a_transposed_kernel(use_bias):
    reference = torch.nn.Linear(6, 5, bias=use_bias)
    x = RNG.standard_normal((2, 3, 6)).astype(np.float32)
    params = {"kernel": reference.weight.detach().numpy().T}
    if use_bias:
        params["bias"] = reference.bias.detach().numpy()
    float32 = jnp.dtype("float32")
    layer = FrozenLinear(6, 5, ("embed", "mlp"), use_bias, float32, storage_of("float32"))
    expected = reference(torch.tensor(x)).detach().numpy()
    bound = layer.bind({"params": params})
    ours = bound.product(x) + (bound.bias[None, None] if use_bias else 0.0)
    np.testing.assert_allclose(ours, expected, **ROUNDING)
    assert (bound.bias is None) == (not use_bias)
    fresh = nn.meta.unbox(layer.init(jax.random.key(0), x, method="product"))["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(np.shape, params)
