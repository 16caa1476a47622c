"""Auxiliary losses of hand-made statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.adapters.routing.losses import (
    ROUTER_LOSSES,
    ImportanceCv,
    LoadBalance,
    RouterEntropy,
    RouterLoss,
    RouterZ,
)
from moe_jax.adapters.routing.statistics import RouterStatistics, SequenceStatistics
from moe_jax.config.parse import parse
from moe_jax.errors import ConfigError


def _statistics(
    tokens, load=None, probabilities=None, weights=None, z=0.0, entropy=0.0, present=None, routed=1
):
    """One layer's, of one sequence; the probabilities and weights are each token's."""
    given = next((of for of in (load, probabilities, weights, present) if of is not None), [0.0])
    of_all = lambda each: tokens * jnp.asarray(each if each is not None else [0.0] * len(given))
    real = jnp.float32([min(tokens, 1)])
    weight = jnp.asarray([0.0] * len(given) if weights is None else weights)
    return RouterStatistics(
        routed=jnp.float32(routed),
        present=jnp.ones(len(given)) if present is None else jnp.asarray(present, jnp.float32),
        tokens=jnp.float32(tokens),
        load_sum=jnp.asarray([0.0] * len(given) if load is None else load, jnp.float32),
        probability_sum=of_all(probabilities),
        weight_sum=of_all(weights),
        squared_logsumexp_sum=jnp.float32(z),
        entropy_sum=jnp.float32(entropy),
        weighted_tokens=jnp.float32(tokens),
        effective_sum=jnp.float32(tokens),
        sequences=SequenceStatistics(real[:, None] * weight[None], jnp.zeros(1), real),
    )


def _stacked(*layers):
    return jax.tree.map(lambda *fields: jnp.stack(fields), *layers)


def _check(loss, layers, per_layer, pooled):
    for scope, expected in (("per_layer", per_layer), ("pooled", pooled)):
        value = loss(coefficient=1.0, scope=scope).total_loss(layers)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (8, 3)])
def test_perfect_balance_reads_top_k(experts, top_k):
    # Every slot is spread evenly: f_e = k/E and P_e = 1/E, so E * E * k/E * 1/E = k.
    tokens = 10 * experts
    even = _statistics(tokens, [10 * top_k] * experts, [1 / experts] * experts)
    np.testing.assert_allclose(LoadBalance(coefficient=1.0).layer_loss(even), top_k, rtol=1e-6)


def test_load_balance_by_hand():
    # Four tokens, two slots, three experts: f = (4, 3, 1) / 4; P = (0.5, 0.3, 0.2).
    # 3 * (1 * 0.5 + 0.75 * 0.3 + 0.25 * 0.2) = 3 * 0.775
    layer = _statistics(4, [4, 3, 1], [0.5, 0.3, 0.2])
    np.testing.assert_allclose(LoadBalance(coefficient=1.0).layer_loss(layer), 2.325, rtol=1e-6)


def test_the_coefficient_is_not_in_the_value():
    layer = _statistics(4, [4, 3, 1], [0.5, 0.3, 0.2])
    np.testing.assert_allclose(LoadBalance(coefficient=0.1).layer_loss(layer), 2.325, rtol=1e-6)


# Two layers, four experts, top-2: each layer sends every token to the same two experts, the first
# layer to 0 and 1, the second to 2 and 3.
COLLAPSED = _stacked(
    _statistics(8, [8, 8, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], z=8.0, entropy=4.0),
    _statistics(8, [0, 0, 8, 8], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], z=24.0, entropy=8.0),
)


def test_collapsed_layers_are_seen_layer_by_layer_and_hidden_by_pooling():
    # One layer: f = (1, 1, 0, 0), P = (0.5, 0.5, 0, 0), so 4 * (0.5 + 0.5) = 4; balance is 2.
    first = jax.tree.map(lambda field: field[0], COLLAPSED)
    np.testing.assert_allclose(LoadBalance(coefficient=1.0).layer_loss(first), 4.0, rtol=1e-6)
    # Pooled: 16 tokens, f = (0.5, 0.5, 0.5, 0.5), P = 0.25 each, which reads as balance.
    _check(LoadBalance, COLLAPSED, per_layer=4.0, pooled=2.0)
    # Half of the experts hold all weight: mean m, deviations m, so 1. Pooled they are all equal.
    _check(ImportanceCv, COLLAPSED, per_layer=1.0, pooled=0.0)
    # 8 / 8 and 24 / 8 tokens, and 32 / 16; 4 / 8 and 8 / 8, and 12 / 16.
    _check(RouterZ, COLLAPSED, per_layer=2.0, pooled=2.0)
    _check(RouterEntropy, COLLAPSED, per_layer=0.75, pooled=0.75)


@pytest.mark.parametrize(("loss", "field"), [(RouterZ, "z"), (RouterEntropy, "entropy")])
def test_pooling_weighs_layers_by_their_tokens(loss, field):
    # 2 / 1 token and 6 / 3 tokens are both 2; 2 / 1 and 3 / 3 are not: their mean is 1.5, but the
    # pooled five over four tokens are 1.25.
    layers = _stacked(_statistics(1, **{field: 2.0}), _statistics(3, **{field: 3.0}))
    _check(loss, layers, per_layer=1.5, pooled=1.25)


@pytest.mark.parametrize("name", ROUTER_LOSSES)
def test_layers_that_do_not_route_are_left_out(name):
    # What a layer that is left frozen reports: nothing.
    routed = _statistics(4, [4, 3, 1], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], z=10.0, entropy=3.0)
    frozen = _statistics(0, [0, 0, 0], routed=0)
    loss = ROUTER_LOSSES[name](coefficient=1.0)
    mixed = loss.total_loss(_stacked(frozen, routed, frozen))
    np.testing.assert_allclose(mixed, loss.layer_loss(routed), rtol=1e-6)
    assert float(mixed) > 0
    assert float(loss.total_loss(_stacked(frozen, frozen))) == 0.0


@pytest.mark.parametrize("loss", [LoadBalance, ImportanceCv])
def test_experts_that_a_layer_does_not_have_do_not_count(loss):
    # The same decisions with and without two experts that do not exist.
    three = _statistics(4, [4, 3, 1], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1])
    five = _statistics(
        4,
        [4, 3, 1, 0, 0],
        [0.5, 0.3, 0.2, 0, 0],
        [0.6, 0.3, 0.1, 0, 0],
        present=[1, 1, 1, 0, 0],
    )
    all_five = five._replace(present=jnp.ones(5))
    of = loss(coefficient=1.0).layer_loss
    np.testing.assert_allclose(of(five), of(three), rtol=1e-6)
    assert abs(float(of(all_five)) - float(of(three))) > 0.1


@pytest.mark.parametrize("experts", [2, 4, 7])
def test_importance_by_hand(experts):
    loss = ImportanceCv(coefficient=1.0)
    balanced = _statistics(6, weights=[1 / experts] * experts)
    np.testing.assert_allclose(loss.layer_loss(balanced), 0.0, atol=1e-7)
    # Everything on one: mean 1/E; variance ((1 - 1/E)^2 + (E - 1)/E^2) / E = (E - 1)/E^2.
    collapsed = _statistics(6, weights=[1.0] + [0.0] * (experts - 1))
    np.testing.assert_allclose(loss.layer_loss(collapsed), experts - 1, rtol=1e-6)


def test_importance_of_unequal_weights():
    # (1, 3): mean 2, variance 1, so 1/4.
    layer = _statistics(1, weights=[1.0, 3.0])
    np.testing.assert_allclose(ImportanceCv(coefficient=1.0).layer_loss(layer), 0.25, rtol=1e-6)


def test_router_z_by_hand():
    layer = _statistics(4, z=10.0)
    np.testing.assert_allclose(RouterZ(coefficient=1.0).layer_loss(layer), 2.5, rtol=1e-6)


def test_router_entropy_by_hand():
    # Of three tokens, two are evenly torn between two experts and one is sure.
    layer = _statistics(3, entropy=2 * math.log(2))
    expected = 2 / 3 * math.log(2)
    np.testing.assert_allclose(
        RouterEntropy(coefficient=1.0).layer_loss(layer), expected, rtol=1e-6
    )


@pytest.mark.parametrize("name", ROUTER_LOSSES)
def test_without_tokens_losses_and_gradients_are_zero(name):
    empty = _stacked(_statistics(0, [0, 0, 0]), _statistics(0, [0, 0, 0]))
    loss = ROUTER_LOSSES[name](coefficient=1.0)
    value, gradient = jax.value_and_grad(loss.total_loss)(empty)
    assert float(value) == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_losses_are_picked_by_their_key_or_by_name():
    fields = {"coefficient": 1.0}
    parsed = parse(dict[str, RouterLoss], dict.fromkeys(ROUTER_LOSSES, fields))
    assert {name: type(loss) for name, loss in parsed.items()} == dict(ROUTER_LOSSES)
    twice = {"router_z": fields, "pooled_z": {"name": "router_z", "scope": "pooled", **fields}}
    assert parse(dict[str, RouterLoss], twice)["pooled_z"] == RouterZ(
        coefficient=1.0, scope="pooled"
    )
    with pytest.raises(
        ConfigError, match="unknown loss 'load_balanse'; did you mean 'load_balance'"
    ):
        parse(dict[str, RouterLoss], {"load_balanse": fields})


def test_losses_average_over_layers_by_default():
    assert LoadBalance(coefficient=1.0).scope == "per_layer"
