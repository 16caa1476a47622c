"""Top-p routing by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_ffn import mixlora
from tolerances import ROUNDING

from moe_jax.adapters.routing import SoftRouter, TopKRouter, TopPRouter
from moe_jax.errors import ConfigError

RNG = np.random.default_rng(0)


def _route(probabilities, top_p, **settings):
    """Routing of one row whose softmax gives `probabilities`, whatever is added to the logits."""
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32)) + 3.0
    return _route_logits(logits[None], top_p, **settings)


def _route_logits(logits, top_p, **settings):
    router = TopPRouter(top_p=top_p, **settings)
    return jax.jit(router.route)(logits, jnp.ones(logits.shape[:2], bool))


def test_the_crossing_expert_is_included_by_hand():
    # 0.3 + 0.4 = 0.7 passes 0.6, so two experts of the first; 0.65 passes it alone; and the third
    # needs three: 0.3 + 0.26 = 0.56.
    probabilities = [[0.1, 0.4, 0.2, 0.3], [0.05, 0.2, 0.65, 0.1], [0.3, 0.24, 0.26, 0.2]]
    routing = _route(probabilities, 0.6)
    kept = [[0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(routing.load[0], kept)
    # Slot c is expert c, and the weights of those kept are over their sums: 0.7, 0.65 and 0.8.
    assert routing.dispatch is None
    expected = [[0, 4 / 7, 0, 3 / 7], [0, 0, 1, 0], [0.3 / 0.8, 0.24 / 0.8, 0.26 / 0.8, 0]]
    np.testing.assert_allclose(routing.weights[0], expected, rtol=1e-6)
    np.testing.assert_allclose(routing.combine[0], expected, rtol=1e-6)
    np.testing.assert_allclose(routing.router_probs[0], probabilities, rtol=1e-6)


def test_without_renormalising_weights_are_the_probabilities():
    routing = _route([[0.1, 0.4, 0.2, 0.3]], 0.6, renormalise=False)
    np.testing.assert_allclose(routing.weights[0], [[0, 0.4, 0, 0.3]], rtol=1e-6)


def test_a_sum_that_lands_on_top_p_does_not_pass_it():
    # Powers of two, so that probabilities and sums are exact: 0.5 is not more than 0.5, so a second
    # expert is needed, and 0.5 + 0.25 = 0.75 is not more than 0.75, so a third.
    logits = jnp.log(2.0) * jnp.array([[[-1.0, -2.0, -3.0, -3.0]]])
    np.testing.assert_array_equal(_route_logits(logits, 0.5).load[0, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(_route_logits(logits, 0.75).load[0, 0], [1, 1, 1, 0])
    np.testing.assert_array_equal(_route_logits(logits, 0.4).load[0, 0], [1, 0, 0, 0])


def test_ties_go_to_the_lower_index():
    # Four of 0.25: two collect 0.5, which passes 0.3. Then three of 0.3 and one of 0.1, where the
    # first two, 0.6, pass 0.5.
    np.testing.assert_array_equal(_route([[0.25] * 4], 0.3).load[0], [[1, 1, 0, 0]])
    np.testing.assert_array_equal(_route([[0.1, 0.3, 0.3, 0.3]], 0.5).load[0], [[0, 1, 1, 0]])


def test_temperature_divides_the_logits():
    # Squared and normalized, 0.4, 0.3, 0.2 and 0.1 are 16, 9, 4 and 1 of 30: the first two pass
    # 0.6 with 0.83, and the first passes 0.5 alone with 0.53.
    probabilities, halved = [[0.4, 0.3, 0.2, 0.1]], {"temperature": 0.5}
    routing = _route(probabilities, 0.6, **halved)
    np.testing.assert_allclose(routing.router_probs[0, 0], np.array([16, 9, 4, 1]) / 30, rtol=1e-5)
    np.testing.assert_allclose(routing.weights[0, 0], [16 / 25, 9 / 25, 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(_route(probabilities, 0.5, **halved).load[0], [[1, 0, 0, 0]])
    np.testing.assert_array_equal(_route(probabilities, 0.5).load[0], [[1, 1, 0, 0]])
    # A high one makes all equal: three of 0.25 are needed for more than 0.5.
    np.testing.assert_array_equal(
        _route(probabilities, 0.52, temperature=100.0).load[0], [[1, 1, 1, 0]]
    )
    # The logits that the losses see are the ones that give these probabilities.
    np.testing.assert_allclose(
        jnp.exp(routing.router_logits) / jnp.exp(routing.router_logits).sum(),
        routing.router_probs,
        rtol=1e-6,
    )


def test_far_apart_logits_stay_finite():
    routing = _route_logits(jnp.array([[[1e4, -1e4, 0.0], [0.0, 0.0, -1e9]]]), 0.9)
    np.testing.assert_array_equal(routing.weights[0], [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    np.testing.assert_array_equal(routing.load[0], [[1, 0, 0], [1, 1, 0]])


def test_a_small_top_p_is_top_1_and_top_p_1_is_soft():
    logits = jnp.asarray(3.0 * RNG.standard_normal((4, 200, 7)), jnp.float32)
    mask = jnp.ones((4, 200), bool)
    one = TopPRouter(top_p=1e-6).route(logits, mask)
    np.testing.assert_allclose(
        one.combine, TopKRouter(top_k=1).route(logits, mask).combine, **ROUNDING
    )
    # Probabilities of 1e-7 are kept too, though sums of float32 may reach one before them.
    everyone = TopPRouter(top_p=1.0).route(logits, mask)
    np.testing.assert_array_equal(everyone.load, 1.0)
    np.testing.assert_allclose(
        everyone.weights, SoftRouter().route(logits, mask).weights, **ROUNDING
    )


def test_random_tokens_equal_sorting_and_adding_up():
    logits = RNG.standard_normal((2, 50, 6)).astype(np.float32)
    routing = _route_logits(jnp.asarray(logits), 0.7)
    for index in np.ndindex(2, 50):
        probs = np.exp(logits[index].astype(np.float64))
        probs /= probs.sum()
        kept, collected = np.zeros(6), 0.0
        for expert in np.argsort(-probs, kind="stable"):
            kept[expert] = 1.0
            collected += probs[expert]
            if collected > 0.7:
                break
        np.testing.assert_array_equal(routing.load[index], kept)
        np.testing.assert_allclose(routing.weights[index], kept * probs / collected, rtol=1e-5)
    assert len(np.unique(routing.load.sum(axis=-1))) > 2


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("top_p", 0.0, "must lie in (0, 1]"),
        ("top_p", 1.01, "must lie in (0, 1]"),
        ("top_p", -0.5, "must lie in (0, 1]"),
        ("temperature", 0.0, "must be positive"),
        ("temperature", -1.0, "must be positive"),
        ("init_std", 0.0, "must be positive"),
        ("jitter_noise", 1.0, "must lie in [0, 1)"),
    ],
)
def test_refusals(field, value, reason):
    with pytest.raises(ConfigError) as error:
        mixlora({"name": "top_p", "top_p": 0.5, field: value})
    assert str(error.value) == f"config.adapters.a.method.router.{field}: {reason}"


def test_top_p_has_to_be_given():
    with pytest.raises(ConfigError, match=r"a\.method\.router\.top_p: this field is required"):
        mixlora({"name": "top_p"})
