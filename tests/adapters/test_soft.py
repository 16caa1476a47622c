"""Soft routing by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from adapted_ffn import mixlora

from moe_jax.adapters.routing import SoftRouter
from moe_jax.errors import ConfigError


def test_weights_and_load_are_the_softmax_by_hand():
    # exp(0), exp(log 2) and exp(log 5) are 1, 2 and 5 of 8.
    logits = jnp.log(jnp.array([[[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]]))
    routing = SoftRouter().route(logits, jnp.array([[True, False]]))
    expected = [[1 / 8, 2 / 8, 5 / 8], [1 / 3, 1 / 3, 1 / 3]]
    for values in (routing.router_probs, routing.weights, routing.load, routing.combine):
        np.testing.assert_allclose(values[0], expected, rtol=1e-6)
    assert routing.dispatch is None


def test_far_apart_logits_stay_finite():
    routing = SoftRouter().route(jnp.array([[[1e4, -1e4, 0.0, -1e9]]]), jnp.ones((1, 1), bool))
    np.testing.assert_array_equal(routing.weights[0, 0], [1.0, 0.0, 0.0, 0.0])


def test_a_setting_of_another_router_is_refused():
    with pytest.raises(ConfigError, match=r"a\.method\.router\.top_k: unknown field"):
        mixlora({"name": "soft", "top_k": 2})
