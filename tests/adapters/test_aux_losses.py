"""Auxiliary losses of hand-made statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.adapters.aux_losses import (
    ROUTER_LOSSES,
    check_router_losses,
    importance_cv,
    load_balance,
    router_loss,
    router_z,
)
from moe_jax.adapters.method import RouterLossConfig
from moe_jax.adapters.statistics import RouterStatistics
from moe_jax.errors import ConfigError


def _statistics(tokens, slot_counts=None, probabilities=None, weights=None, z=0.0):
    """One layer's; the probabilities and weights are each token's."""
    slots = jnp.zeros((1, 1)) if slot_counts is None else jnp.asarray(slot_counts, jnp.float32)
    experts = slots.shape[-1]
    of_all = lambda each: tokens * jnp.asarray(each if each is not None else [0.0] * experts)
    return RouterStatistics(
        tokens=jnp.float32(tokens),
        slot_counts=slots,
        probability_sum=of_all(probabilities),
        weight_sum=of_all(weights),
        squared_logsumexp_sum=jnp.float32(z),
        entropy_sum=jnp.float32(0.0),
    )


def _stacked(*layers):
    return jax.tree.map(lambda *fields: jnp.stack(fields), *layers)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (8, 3)])
def test_perfect_balance_reads_top_k(experts, top_k):
    # Every slot is spread evenly: f_e = k/E and P_e = 1/E, so E * E * k/E * 1/E = k.
    tokens = 10 * experts
    even = _statistics(tokens, [[10] * experts] * top_k, [1 / experts] * experts)
    np.testing.assert_allclose(load_balance(even), top_k, rtol=1e-6)


def test_load_balance_by_hand():
    # Four tokens, two slots, three experts: f = (4, 3, 1) / 4; P = (0.5, 0.3, 0.2).
    # 3 * (1 * 0.5 + 0.75 * 0.3 + 0.25 * 0.2) = 3 * 0.775
    layer = _statistics(4, [[3, 1, 0], [1, 2, 1]], [0.5, 0.3, 0.2])
    np.testing.assert_allclose(load_balance(layer), 2.325, rtol=1e-6)


# Two layers, four experts, top-2: each layer sends every token to the same two experts, the first
# layer to 0 and 1, the second to 2 and 3.
COLLAPSED = _stacked(
    _statistics(8, [[8, 0, 0, 0], [0, 8, 0, 0]], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], z=8.0),
    _statistics(8, [[0, 0, 8, 0], [0, 0, 0, 8]], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], z=24.0),
)


def test_collapsed_layers_are_seen_layer_by_layer_and_hidden_by_pooling():
    # One layer: f = (1, 1, 0, 0), P = (0.5, 0.5, 0, 0), so 4 * (0.5 + 0.5) = 4; balance is 2.
    first = jax.tree.map(lambda field: field[0], COLLAPSED)
    np.testing.assert_allclose(load_balance(first), 4.0, rtol=1e-6)
    np.testing.assert_allclose(router_loss("load_balance", "per_layer", COLLAPSED), 4.0, rtol=1e-6)
    # Pooled: 16 tokens, f = (0.5, 0.5, 0.5, 0.5), P = 0.25 each, which reads as balance.
    np.testing.assert_allclose(router_loss("load_balance", "pooled", COLLAPSED), 2.0, rtol=1e-6)
    # Half of the experts hold all weight: mean m, deviations m, so 1. Pooled they are all equal.
    np.testing.assert_allclose(router_loss("importance_cv", "per_layer", COLLAPSED), 1.0, rtol=1e-6)
    np.testing.assert_allclose(router_loss("importance_cv", "pooled", COLLAPSED), 0.0, atol=1e-7)
    # 8 / 8 and 24 / 8 tokens, and 32 / 16.
    np.testing.assert_allclose(router_loss("router_z", "per_layer", COLLAPSED), 2.0, rtol=1e-6)
    np.testing.assert_allclose(router_loss("router_z", "pooled", COLLAPSED), 2.0, rtol=1e-6)


def test_pooling_weighs_layers_by_their_tokens():
    # 2 / 1 token and 6 / 3 tokens are both 2; 2 / 1 and 3 / 3 are not: their mean is 1.5, but the
    # pooled five over four tokens are 1.25.
    layers = _stacked(_statistics(1, z=2.0), _statistics(3, z=3.0))
    np.testing.assert_allclose(router_loss("router_z", "per_layer", layers), 1.5, rtol=1e-6)
    np.testing.assert_allclose(router_loss("router_z", "pooled", layers), 1.25, rtol=1e-6)


@pytest.mark.parametrize("experts", [2, 4, 7])
def test_importance_by_hand(experts):
    slots = [[0] * experts]
    balanced = _statistics(6, slots, weights=[1 / experts] * experts)
    np.testing.assert_allclose(importance_cv(balanced), 0.0, atol=1e-7)
    # Everything on one: mean 1/E; variance ((1 - 1/E)^2 + (E - 1)/E^2) / E = (E - 1)/E^2.
    collapsed = _statistics(6, slots, weights=[1.0] + [0.0] * (experts - 1))
    np.testing.assert_allclose(importance_cv(collapsed), experts - 1, rtol=1e-6)


def test_importance_of_unequal_weights():
    # (1, 3): mean 2, variance 1, so 1/4.
    layer = _statistics(1, [[0, 0]], weights=[1.0, 3.0])
    np.testing.assert_allclose(importance_cv(layer), 0.25, rtol=1e-6)


def test_router_z_by_hand():
    np.testing.assert_allclose(router_z(_statistics(4, z=10.0)), 2.5, rtol=1e-6)


@pytest.mark.parametrize("name", ROUTER_LOSSES)
def test_without_tokens_losses_and_gradients_are_zero(name):
    empty = _stacked(_statistics(0, [[0, 0, 0]]), _statistics(0, [[0, 0, 0]]))
    value, gradient = jax.value_and_grad(lambda s: router_loss(name, "per_layer", s))(empty)
    assert float(value) == 0.0
    assert all(np.isfinite(field).all() for field in gradient)


def test_unknown_losses_are_refused():
    check_router_losses({name: RouterLossConfig(coefficient=1.0) for name in ROUTER_LOSSES})
    with pytest.raises(ConfigError, match="unknown 'load_balanse'; did you mean 'load_balance'"):
        check_router_losses({"load_balanse": RouterLossConfig(coefficient=1.0)})


def test_losses_average_over_layers_by_default():
    assert {f.name: f.default for f in dataclasses.fields(RouterLossConfig)}["scope"] == "per_layer"
