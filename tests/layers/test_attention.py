"""Attention against PyTorch; masks and positions against hand-written values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import ROUNDING

from moe_jax.layers.attention import (
    attention_mask,
    cached_attention,
    causal_attention,
    positions_from_segments,
)
from moe_jax.layers.kv_cache import CachePosition

SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 2, 2, 0],
        [0, 0, 1, 1, 1, 1],
    ]
)


@jax.jit
def attend(query, key, value, segment_ids=None):
    return causal_attention(query, key, value, segment_ids=segment_ids, implementation="xla")


def _inputs(heads, kv_heads, width=8, dtype=np.float32):
    rng = np.random.default_rng(heads + kv_heads)
    return [
        rng.standard_normal((3, 6, n, width)).astype(dtype) for n in (heads, kv_heads, kv_heads)
    ]


def _torch_attention(query, key, value, mask):
    """Attention of PyTorch, with heads before positions; `mask` [B, 1, S, S] includes causality."""
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
    ours = attend(*inputs, SEGMENTS if masked else None)
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


def _by_hand(query, key, value, mask, *, window, scale, softcap):
    """Attention in a loop over queries, with key heads repeated for their groups."""
    out = np.zeros_like(query)
    for b, q, h in np.ndindex(query.shape[:3]):
        k = h // (query.shape[2] // key.shape[2])
        seen = [t for t in range(max(0, q - window + 1), q + 1) if mask[b, 0, q, t]]
        scores = scale * key[b, seen, k] @ query[b, q, h]
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, q, h] = weights / weights.sum() @ value[b, seen, k]
    return out


@pytest.mark.parametrize("window", [1, 3, 6])
@pytest.mark.parametrize(("scale", "softcap"), [(0.9, 1.5), (0.2, None)])
def test_window_scale_and_cap_by_hand(window, scale, softcap):
    inputs = _inputs(4, 2)
    mask = np.asarray(attention_mask(jnp.asarray(SEGMENTS)))

    @jax.jit
    def ours(slides=None):
        return causal_attention(
            *inputs,
            segment_ids=SEGMENTS,
            implementation="xla",
            scale=scale,
            window=window,
            slides=slides,
            softcap=softcap,
        )

    options = {"scale": scale, "softcap": softcap}
    windowed = _by_hand(*inputs, mask, window=window, **options)
    np.testing.assert_allclose(ours(), windowed, **ROUNDING)
    np.testing.assert_allclose(ours(True), windowed, **ROUNDING)  # known while it runs only
    everything = _by_hand(*inputs, mask, window=6, **options)
    np.testing.assert_allclose(ours(False), everything, **ROUNDING)


def test_padding_gives_finite_values_and_gradients():
    query, key, value = (jnp.asarray(x) for x in _inputs(2, 2))
    segment_ids = jnp.zeros((3, 6), jnp.int32).at[:, 2:4].set(1)
    total = lambda *inputs: attend(*inputs, segment_ids).sum()
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


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (7, 1.5)])
def test_tokens_behind_a_cache_attend_as_in_one_row(window, softcap):
    # Ten tokens: the first seven of them are in a cache of twelve slots, behind two of padding.
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, 10, heads, 4)), jnp.float32) for heads in (4, 2, 2)
    )
    options = {"scale": 0.7, "window": window, "softcap": softcap}
    expected = causal_attention(
        query, key, value, segment_ids=None, implementation="xla", **options
    )
    rubbish = 100 * rng.standard_normal((1, 2, 12, 4)).astype(np.float32)
    cached = [
        jnp.asarray(rubbish).at[:, :, 2:9].set(jnp.swapaxes(array[:, :7], 1, 2))
        for array in (key, value)
    ]
    place = CachePosition(jnp.int32(9), jnp.array([2]))
    found = cached_attention(query[:, 7:], key[:, 7:], value[:, 7:], *cached, place, **options)
    np.testing.assert_allclose(found, expected[:, 7:], **ROUNDING)
