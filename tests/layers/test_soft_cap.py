"""The soft cap, against hand-written values."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.activation import soft_cap


def test_by_hand():
    x = jnp.array([0.0, 0.01, 3.0, -3.0, 1000.0])
    # Near x below the cap, the cap itself far beyond it; 3 tanh(1) in between.
    expected = [0.0, 0.01, 3 * np.tanh(1.0), -3 * np.tanh(1.0), 3.0]
    np.testing.assert_allclose(soft_cap(x, 3.0), expected, rtol=1e-5)


def test_the_slope_is_one_at_zero_and_vanishes_far_out():
    slope = jax.vmap(jax.grad(lambda x: soft_cap(x, 3.0)))(jnp.array([0.0, 1000.0]))
    np.testing.assert_allclose(slope, [1.0, 0.0], atol=1e-6)
