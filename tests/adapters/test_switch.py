"""Switch routing by hand: capacity, overflow, and layers left frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from adapted_ffn import AdaptedFFN, llama_mlp, mixlora, random_input
from tolerances import FEW_OPERATIONS, FEW_OPERATIONS_GRADIENT, ROUNDING

from moe_jax.adapters.routing import SwitchRouter
from moe_jax.adapters.routing.statistics import router_statistics
from moe_jax.errors import ConfigError

# Which expert each of eight tokens chooses, with probability 0.7, and 0.3 shared by the others.
CHOICES = np.array([[0, 0, 1, 0, 0, 1, 2, 0], [1, 1, 1, 0, 1, 0, 0, 0]])
PROBABILITIES = np.where(np.arange(4) == CHOICES[..., None], 0.7, 0.1)
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)) + 3.0
EVERYWHERE = np.ones((2, 8), bool)


def _route(mask=EVERYWHERE, **settings):
    return jax.jit(SwitchRouter(**settings).route)(LOGITS, jnp.asarray(mask))


def test_capacity_is_counted_in_each_sequence_by_hand():
    # Capacity 2. The first row's expert 0 serves its tokens at 0 and 1 and not those at 3, 4 and 7;
    # expert 1 serves 2 and 5; expert 2 serves 6. The second row is counted by itself: expert 1
    # serves 0 and 1, not 2 and 4; expert 0 serves 3 and 5, not 6 and 7.
    routing = _route(capacity=2)
    served = np.array([[1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 0, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(routing.overflow, 1 - served)
    choices = np.eye(4)[CHOICES]
    np.testing.assert_array_equal(routing.dispatch[:, :, 0], choices * served[..., None])
    np.testing.assert_allclose(routing.weights[..., 0], 0.7 * served, **FEW_OPERATIONS)
    np.testing.assert_allclose(routing.combine, 0.7 * choices * served[..., None], **FEW_OPERATIONS)
    # The load is what tokens chose, before capacity.
    np.testing.assert_array_equal(routing.load, choices)
    np.testing.assert_allclose(routing.router_probs, PROBABILITIES, **FEW_OPERATIONS)


def test_padding_takes_no_capacity_wherever_it_stands():
    # The first row is padded at 0, 3 and 7: its expert 0 then serves 1 and 4. The second row is
    # padded on the left, at 0 to 2: expert 1 serves 4; expert 0 serves 3 and 5, not 6 and 7.
    mask = np.array([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]], bool)
    routing = _route(mask, capacity=2)
    overflow = np.array([[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(routing.overflow[mask], overflow[mask])
    statistics = router_statistics(routing, jnp.asarray(mask))
    np.testing.assert_array_equal(statistics.overflow_sum, 2.0)
    np.testing.assert_array_equal(statistics.tokens, 10.0)
    # Loads of the real tokens: 0 of row one at 1 and 4, and five of row two's but the one at 4.
    np.testing.assert_array_equal(statistics.load_sum, [2 + 4, 2 + 1, 1, 0])


@pytest.mark.parametrize("settings", [{"capacity": 2}, {"capacity_factor": 1.0}], ids=str)
def test_sequences_in_one_row_are_served_as_each_alone(settings):
    # Sequences of 3, 4 and 1 tokens; of 2 and 4, with padding behind them.
    ids = np.array([[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 2, 2, 2, 2, 0, 0]])
    route = jax.jit(SwitchRouter(**settings).route)
    together = route(LOGITS, jnp.asarray(ids != 0), segment_ids=jnp.asarray(ids))
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2)):
        own = (row, ids[row] == segment)
        tokens = LOGITS[own][None]
        alone = SwitchRouter(**settings).route(tokens, jnp.ones(tokens.shape[:2], bool))
        for field in ("dispatch", "weights", "load", "overflow"):
            ours, theirs = getattr(together, field)[own], getattr(alone, field)[0]
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{field} {row} {segment}")
    # One long sequence would overflow elsewhere.
    as_one = _route(**settings).overflow
    assert (np.asarray(as_one) != together.overflow)[ids != 0].any()


def _token_by_token(prompt, **settings):
    """Overflow where the first `prompt` tokens are routed together and the others one by one."""
    router, earlier, found = SwitchRouter(**settings), jnp.zeros((2, 4), jnp.int32), []
    for at in ([*range(prompt)], *([n] for n in range(prompt, 8))):
        routing = router.route(LOGITS[:, at], jnp.ones((2, len(at)), bool), earlier=earlier)
        earlier = earlier + jnp.sum(routing.load, axis=1).astype(jnp.int32)
        found.append(routing.overflow)
    return np.concatenate(found, axis=1)


def test_tokens_after_others_find_the_capacity_those_left():
    np.testing.assert_array_equal(_token_by_token(3, capacity=2), _route(capacity=2).overflow)


def test_a_capacity_factor_counts_the_tokens_so_far():
    # Of four experts, the four tokens of the prompt leave each a capacity of one, and each further
    # token, from the fifth on, one of two. Row one: expert 0 serves the token at 0, and not those
    # at 1, 3, 4 (its fourth) and 7; expert 1 serves 2 and 5; expert 2 serves 6. Row two: expert 1
    # serves 0, not 1, 2 and 4; expert 0 serves 3 and 5, not 6 and 7.
    served = [[1, 0, 1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0, 0]]
    overflow = _token_by_token(4, capacity_factor=1.0)
    np.testing.assert_array_equal(overflow, 1 - np.array(served))
    assert (overflow != _route(capacity_factor=1.0).overflow).any()


@pytest.mark.parametrize(
    ("factor", "tokens", "capacity"),
    [
        (1.0, 8, 2),  # 8 / 4
        (1.25, 8, 3),  # 2.5, rounded up
        (1.0, 5, 2),  # 1.25, rounded up
        (0.5, 4, 1),  # 0.5, rounded up
        (1.1, 10, 3),  # 2.75, rounded up
        (2.4, 5, 3),  # exactly 3; 2.4 * 5 / 4 is a little more in float32
        (1e-5, 8, 1),  # never none
    ],
)
def test_capacity_from_a_factor_counts_real_tokens_only(factor, tokens, capacity):
    # All tokens choose expert 1, so as many are served as it has capacity. Padding does not add.
    length = 12
    logits = jnp.zeros((2, length, 4)).at[..., 1].set(2.0)
    mask = np.arange(length)[None] < np.array([[tokens], [0]])
    route = jax.jit(SwitchRouter(capacity_factor=factor).route)
    for place in (mask, mask[:, ::-1]):
        routing = route(logits, jnp.asarray(place))
        served = np.sum((1 - np.asarray(routing.overflow)) * place, axis=1)
        np.testing.assert_array_equal(served, [capacity, 0])


def test_ties_go_to_the_lower_index_and_far_apart_logits_stay_finite():
    logits = jnp.array([[[1.0, 1.0, 1.0], [0.0, 2.0, 2.0], [1e4, -1e4, 0.0], [0.0, 1.0, -1e9]]])
    routing = SwitchRouter(capacity=4).route(logits, jnp.ones((1, 4), bool))
    np.testing.assert_array_equal(jnp.argmax(routing.dispatch[0, :, 0], axis=-1), [0, 1, 0, 1])
    np.testing.assert_allclose(routing.weights[0, 0], [1 / 3], **FEW_OPERATIONS)
    np.testing.assert_array_equal(routing.weights[0, 2], [1.0])


@pytest.mark.parametrize("weights", ["probability", "straight_through"])
@pytest.mark.parametrize("overflow", ["residual", "input", "frozen"])
def test_what_becomes_of_an_overflowing_token_by_hand(overflow, weights):
    routing = _route(capacity=2, overflow=overflow, weights=weights)
    weight = 1.0 if weights == "straight_through" else 0.7
    lost = np.asarray(routing.overflow)
    np.testing.assert_array_equal(np.sum(routing.dispatch, axis=(-2, -1)), 1 - lost)
    left = {"residual": 0.0, "input": 0.0, "frozen": 1.0}[overflow]
    np.testing.assert_allclose(
        routing.weights[..., 0], np.where(lost == 1, left, weight), **FEW_OPERATIONS
    )
    if overflow == "input":
        np.testing.assert_allclose(routing.bypass, weight * lost, **FEW_OPERATIONS)
    else:
        assert routing.bypass is None


def test_straight_through_has_the_gradient_of_the_probability_over_its_value():
    def weight(logits, weights):
        router = SwitchRouter(capacity=2, weights=weights)
        return router.route(logits, jnp.asarray(EVERYWHERE)).weights[0, 0, 0]

    through = jax.grad(weight)(LOGITS, "straight_through")[0, 0]
    # d p_0 / d logit_e is p_0 ((e == 0) - p_e), with p = 0.7, 0.1, 0.1, 0.1; over p_0.
    np.testing.assert_allclose(through, [0.3, -0.1, -0.1, -0.1], **FEW_OPERATIONS_GRADIENT)
    plain = jax.grad(weight)(LOGITS, "probability")[0, 0]
    np.testing.assert_allclose(plain, 0.7 * through, **FEW_OPERATIONS_GRADIENT)


def test_training_and_inference_are_the_same_function():
    # The reference gives its input back at inference. Without noise there must be no difference,
    # nor may a token's output depend on the tokens after it.
    mlp, method = llama_mlp(), mixlora({"name": "switch", "capacity": 2})
    ours = AdaptedFFN(mlp, method, 2)
    tree, x, key = ours.random_tree(), random_input(2, 9), jax.random.key(0)
    infer = jax.jit(ours)
    training, at_training = jax.jit(ours)(tree, x, dropout_key=key)
    inference, at_inference = infer(tree, x)
    np.testing.assert_allclose(training, inference, **ROUNDING)
    jax.tree.map(np.testing.assert_array_equal, at_training, at_inference)
    assert 0 < at_inference.overflow_sum < 18
    # The tokens after a token are other ones, and its output is the same.
    changed, _ = infer(tree, x.at[:, 5:].multiply(-3.0))
    np.testing.assert_allclose(changed[:, :5], inference[:, :5], **ROUNDING)
    # And there is something to compare: the experts' weights matter.
    others = {**jax.tree.map(lambda leaf: leaf + 0.1, tree), "router": tree["router"]}
    assert np.abs(infer(others, x)[0] - inference).max() > 1e-2

    router = dataclasses.replace(method.router, jitter_noise=0.5)
    noisy = AdaptedFFN(mlp, dataclasses.replace(method, router=router), 2)
    assert np.abs(jax.jit(noisy)(tree, x, dropout_key=key)[0] - inference).max() > 1e-2
    np.testing.assert_allclose(jax.jit(noisy)(tree, x)[0], inference, **ROUNDING)


@pytest.mark.parametrize(
    ("settings", "field", "reason"),
    [
        ({}, "capacity", "give either capacity or capacity_factor"),
        ({"capacity": 2, "capacity_factor": 1.0}, "capacity", "give either"),
        ({"capacity": 0}, "capacity", "must be positive"),
        ({"capacity": -3}, "capacity", "must be positive"),
        ({"capacity_factor": 0.0}, "capacity_factor", "must be positive"),
        ({"capacity": 2, "sparse_step": 0}, "sparse_step", "must be positive"),
        ({"capacity": 2, "overflow": "drop"}, "overflow", "is not one of 'residual', 'input'"),
        ({"capacity": 2, "weights": "one"}, "weights", "is not one of 'probability'"),
        ({"capacity": 2.5}, "capacity", "expected int"),
    ],
)
def test_refusals(settings, field, reason):
    with pytest.raises(ConfigError) as error:
        mixlora({"name": "switch", **settings})
    assert str(error.value).startswith(f"config.adapters.a.method.router.{field}: ")
    assert reason in str(error.value)


def test_which_layers_are_routed():
    # As transformers' Switch: every one with step 1, otherwise those with index % step == 1.
    layers = jnp.arange(6)
    assert SwitchRouter(capacity=1).routes_layer(layers) is None
    for step, routed in ((2, [1, 3, 5]), (3, [1, 4]), (4, [1, 5]), (9, [1])):
        found = SwitchRouter(capacity=1, sparse_step=step).routes_layer(layers)
        np.testing.assert_array_equal(np.flatnonzero(found), routed)


def test_a_depth_that_leaves_no_layer_routed_is_refused():
    router = {"name": "switch", "capacity": 2, "sparse_step": 2}
    method = {**tiny_program.MIXLORA, "router": router}
    with pytest.raises(ConfigError) as error:
        tiny_program.program({"a": method}, config=tiny_program.model_config(num_layers=1))
    assert str(error.value) == (
        "config.adapters.a.method.router.sparse_step: 2 routes layer 1 first, counted from 0, but "
        "the model has 1 layer; use 1"
    )
    tiny_program.program({"a": method}, config=tiny_program.model_config(num_layers=2))
