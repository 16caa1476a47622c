"""Attention against PyTorch, its masks and positions by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import ROUNDING

from moe_jax.layers.attention import attention_mask, causal_attention, positions_from_segments

SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 2, 2, 0],
        [0, 0, 1, 1, 1, 1],
    ]
)


@jax.jit
def attend(query, key, value, mask=None):
    return causal_attention(query, key, value, mask=mask, implementation="xla")


def _inputs(heads, kv_heads, width=8, dtype=np.float32):
    rng = np.random.default_rng(heads + kv_heads)
    return [
        rng.standard_normal((3, 6, n, width)).astype(dtype) for n in (heads, kv_heads, kv_heads)
    ]


def _torch_attention(query, key, value, mask):
    """PyTorch's, which wants heads before positions; `mask` [B, 1, S, S] holds causality too."""
    query, key, value = (torch.tensor(x).transpose(1, 2) for x in (query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.tensor(mask), enable_gqa=True
    )
    return attended.transpose(1, 2).numpy()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_pytorch(heads, kv_heads, masked):
    inputs = _inputs(heads, kv_heads)
    causal = np.tril(np.ones((6, 6), bool))[None, None]
    same = SEGMENTS[:, None, :, None] == SEGMENTS[:, None, None, :]
    expected = _torch_attention(*inputs, causal & same if masked else causal)
    mask = attention_mask(jnp.asarray(SEGMENTS)) if masked else None
    ours = attend(*inputs, mask)
    np.testing.assert_allclose(ours, expected, **ROUNDING)


def test_the_mask_by_hand():
    mask = np.asarray(attention_mask(jnp.array([[1, 1, 2, 0]])))
    assert mask.shape == (1, 1, 4, 4)
    np.testing.assert_array_equal(
        mask[0, 0],
        [
            [True, True, False, False],
            [True, True, False, False],
            [False, False, True, False],
            [False, False, False, True],  # padding has itself, so that its softmax is defined
        ],
    )


def test_padding_gives_finite_values_and_gradients():
    query, key, value = (jnp.asarray(x) for x in _inputs(2, 2))
    mask = attention_mask(jnp.zeros((3, 6), jnp.int32).at[:, 2:4].set(1))
    total = lambda *inputs: attend(*inputs, mask).sum()
    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, key, value):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_scores_of_half_precision_are_not_rounded(dtype, bits):
    query, key, value = _inputs(4, 2)
    inputs = [jnp.asarray(x, dtype) for x in (8 * query, key, value)]  # scores of up to 60
    exact = [np.asarray(x, np.float64) for x in inputs]
    causal = np.tril(np.ones((6, 6), bool))[None, None]
    expected = _torch_attention(*exact, causal)
    ours = attend(*inputs)
    assert ours.dtype == jnp.dtype(dtype)
    # Probabilities and the result are rounded, by 2^-bits at most and on values below 4. A score of
    # 32 that is rounded is off by up to 32 * 2^-bits, and its probability by the same share.
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0, atol=4 * 2.0**-bits)


def test_positions_restart_with_every_sequence():
    positions = positions_from_segments(jnp.asarray(SEGMENTS))
    np.testing.assert_array_equal(
        positions,
        [
            [0, 1, 2, 3, 4, 5],
            [0, 1, 2, 0, 1, 0],
            [0, 0, 0, 1, 2, 3],
        ],
    )
    assert positions.dtype == jnp.int32
