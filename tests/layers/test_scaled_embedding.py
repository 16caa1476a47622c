"""Embeddings scaled by sqrt(D), against transformers' Gemma."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

from moe_jax.layers.vocabulary import TokenEmbedding

WIDTH = 3072  # sqrt(3072) = 55.43 is 55.5 in bfloat16
TOKENS = np.array([[3, 3, 0], [9, 1, 2]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scale_is_rounded_to_the_type_of_the_product(dtype):
    table = np.random.default_rng(0).standard_normal((10, WIDTH)).astype(np.float32)
    reference = GemmaTextScaledWordEmbedding(10, WIDTH, None, embed_scale=WIDTH**0.5)
    reference.weight.data = torch.tensor(table)
    reference.to(getattr(torch, dtype))
    expected = reference(torch.tensor(TOKENS)).detach().float().numpy()

    embedding = TokenEmbedding(10, WIDTH, jnp.dtype(dtype), jnp.dtype("float32"), scale=WIDTH**0.5)
    x = embedding.apply({"params": {"embedding": table}}, jnp.asarray(TOKENS))
    assert x.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(x, np.float32), expected)
    unscaled = table[TOKENS] * np.float32(WIDTH**0.5)
    assert (dtype == "float32") == np.array_equal(np.asarray(x, np.float32), unscaled)
