"""Dropout: shares, scale, independence of its bits, gradients and traced rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from moe_jax.layers.dropout import dropout

TOKENS, FEATURES = 2048, 768


def kept(seed, rate=0.3, shape=(TOKENS, FEATURES)):
    return np.asarray(dropout(jnp.ones(shape), rate, jax.random.key(seed))) != 0


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9])
def test_share_and_scale(rate):
    x = jax.random.normal(jax.random.key(1), (64, 32, 96)) + 5.0
    y = np.asarray(dropout(x, rate, jax.random.key(0)))
    is_kept = y != 0
    np.testing.assert_allclose(y[is_kept], np.asarray(x)[is_kept] / (1 - rate), rtol=1e-6)
    error = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(is_kept.mean() - (1 - rate)) <= 5 * error


def test_counts_of_tokens_and_features_are_binomial():
    """Variances of the row and column sums equal those of independent bits."""
    mask = kept(0)
    for axis, number in ((0, TOKENS), (1, FEATURES)):
        counts = mask.sum(axis)
        ratio = counts.var(ddof=1) / (number * 0.3 * 0.7)
        low, high = scipy.stats.chi2.interval(1 - 1e-6, len(counts) - 1)
        assert low < ratio * (len(counts) - 1) < high


@pytest.mark.parametrize(
    "pair",
    [
        lambda mask: (mask[:-1], mask[1:]),  # neighboring tokens
        lambda mask: (mask[:, :-1], mask[:, 1:]),  # neighboring features
        lambda mask: (mask, kept(1)),  # two keys
        lambda mask: (mask[:-1, :-1] ^ mask[1:, 1:], mask[:-1, 1:] ^ mask[1:, :-1]),
    ],
    ids=["tokens", "features", "keys", "squares"],
)
def test_bits_are_not_correlated(pair):
    first, second = pair(kept(0))
    correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(first.size)


def test_equal_keys_give_equal_masks_in_jit_and_outside():
    x = jax.random.normal(jax.random.key(1), (8, 16))
    key = jax.random.key(3)
    outside = dropout(x, 0.4, key)
    inside = jax.jit(dropout)(x, jnp.float32(0.4), key)
    np.testing.assert_array_equal(outside != 0, inside != 0)
    np.testing.assert_allclose(outside, inside, rtol=1e-6)
    assert (kept(0) != kept(1)).any()


def test_gradient_is_the_mask():
    x = jax.random.normal(jax.random.key(1), (8, 16))
    key = jax.random.key(3)
    gradient = jax.grad(lambda x: jnp.sum(dropout(x, 0.25, key)))(x)
    expected = np.where(np.asarray(dropout(x, 0.25, key)) != 0, 1 / 0.75, 0.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_the_generator_draws_a_word_a_token_and_a_feature():
    """Words of JAX's generator are the only shapes that threefry works on."""
    program = jax.make_jaxpr(lambda x, key: dropout(x, 0.05, key))(
        jnp.ones((4, 256, 1024)), jax.random.key(0)
    )
    words = [
        equation.outvars[0].aval.size
        for equation in program.jaxpr.eqns
        if equation.primitive.name == "random_bits"
    ]
    assert words == [4 * 256, 1024]
