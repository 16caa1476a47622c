"""Routing decisions by hand; the router's precision and its jitter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import ROUNDING

from moe_jax.adapters.mixlora import MixLoraConfig, MixLoraFFN
from moe_jax.adapters.routing import TopKRouter
from moe_jax.adapters.routing.router import RouterLogits, Routing

RNG = np.random.default_rng(0)


def _routing(probabilities, top_k):
    """Routing of one row whose softmax gives `probabilities`, whatever is added to the logits."""
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32)) + 3.0
    return _route(logits[None], top_k)


def _route(logits, top_k):
    return TopKRouter(top_k=top_k).route(logits, jnp.ones(logits.shape[:2], bool))


def test_top_2_by_hand():
    # 0.5 and 0.3 of 0.8 are 0.625 and 0.375; 0.6 and 0.3 of 0.9 are two thirds and one third.
    routing = _routing([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], 2)
    np.testing.assert_allclose(routing.weights[0], [[0.625, 0.375], [2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(
        routing.dispatch[0],
        [
            [[1, 0, 0], [0, 1, 0]],
            [[0, 0, 1], [0, 1, 0]],
        ],
    )
    np.testing.assert_allclose(
        routing.router_probs[0], [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], rtol=1e-6
    )
    np.testing.assert_array_equal(routing.load[0], [[1, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(
        routing.combine[0], [[0.625, 0.375, 0], [0, 1 / 3, 2 / 3]], rtol=1e-6
    )


def test_a_slot_that_is_an_expert_has_the_experts_weight():
    weights = jnp.array([[[0.2, 0.0, 0.7]]])
    routing = Routing(jnp.zeros((1, 1, 3)), weights, None, weights, weights)
    np.testing.assert_array_equal(routing.combine, weights)


def test_top_1_gives_all_weight_to_one_expert():
    routing = _routing([[0.2, 0.7, 0.1]], 1)
    np.testing.assert_array_equal(routing.weights[0], [[1.0]])
    np.testing.assert_array_equal(routing.dispatch[0], [[[0, 1, 0]]])


def test_all_experts_keep_their_probabilities():
    routing = _routing([[0.2, 0.7, 0.1]], 3)
    np.testing.assert_allclose(routing.weights[0], [[0.7, 0.2, 0.1]], rtol=1e-6)


def test_ties_go_to_the_lower_index():
    logits = jnp.array([[[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 2.0], [5.0, 0.0, 0.0, 0.0]]])
    routing = _route(logits, 2)
    np.testing.assert_array_equal(
        jnp.argmax(routing.dispatch, axis=-1)[0], [[0, 1], [1, 3], [0, 1]]
    )
    np.testing.assert_allclose(routing.weights[0, :2], [[0.5, 0.5], [0.5, 0.5]], rtol=1e-6)


def test_far_apart_logits_stay_finite():
    routing = _route(jnp.array([[[1e4, -1e4, 0.0]]]), 2)
    np.testing.assert_array_equal(routing.weights[0, 0], [1.0, 0.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_router_computes_in_float32(dtype):
    x = jnp.asarray(RNG.standard_normal((2, 8, 64)), dtype)
    kernel = RNG.standard_normal((64, 4)).astype(np.float32)
    router = RouterLogits(TopKRouter(), 4, "embed")
    logits = router.apply({"adapters": {"kernel": kernel}}, x, deterministic=True)
    assert logits.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ kernel.astype(np.float64)
    # Logits of about 8: one rounding of kernel or result to bfloat16 would cost 1e-2.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_jitter_multiplies_the_input_by_uniform_noise():
    # An identity kernel shows the input as the router sees it.
    router = RouterLogits(TopKRouter(jitter_noise=0.25), 100, "embed")
    ones = jnp.ones((10, 10, 100))
    variables = {"adapters": {"kernel": jnp.eye(100)}}
    key = {"dropout": jax.random.key(0)}
    seen = np.asarray(router.apply(variables, ones, deterministic=False, rngs=key))
    assert 0.75 <= seen.min() < 0.751 and 1.249 < seen.max() <= 1.25
    np.testing.assert_allclose(seen.mean(), 1.0, atol=0.01)
    # A uniform distribution of half-width h has the standard deviation h / sqrt(3).
    np.testing.assert_allclose(seen.std(), 0.25 / 3**0.5, rtol=0.02)
    calm = router.apply(variables, ones, deterministic=True)
    np.testing.assert_array_equal(calm, 1.0)


def test_absent_experts_are_never_chosen_before_present_ones():
    rng, present = np.random.default_rng(1), jnp.array([True, False, True, False])
    kernel = {"adapters": {"kernel": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)}}
    x = jnp.asarray(rng.standard_normal((3, 5, 6)), jnp.float32)
    module = RouterLogits(TopKRouter(), 4, "embed")
    logits = module.apply(kernel, x, deterministic=True, present=present)
    everyone = module.apply(kernel, x, deterministic=True)
    np.testing.assert_array_equal(logits[..., ::2], everyone[..., ::2])
    routing = _route(logits, 2)
    # A softmax over the two experts that there are; both of them are chosen.
    expected = jax.nn.softmax(everyone[..., ::2], axis=-1)
    np.testing.assert_allclose(routing.combine[..., ::2], expected, rtol=1e-6)
    np.testing.assert_array_equal(routing.combine[..., 1::2], 0.0)
    np.testing.assert_array_equal(routing.router_probs[..., 1::2], 0.0)


def test_jitter_reaches_the_router_only_and_only_while_training():
    # With equal experts that are all chosen, their weights do not matter: what is left of jitter
    # in the output would be jitter of the experts' input.
    width, ffn_width, experts, rank = 8, 12, 2, 3
    shapes = {"gate_proj": (width, ffn_width), "up_proj": (width, ffn_width)}
    shapes["down_proj"] = (ffn_width, width)
    variables = {"router": {"kernel": RNG.standard_normal((width, experts))}}
    for name, (fan_in, fan_out) in shapes.items():
        one_a, one_b = RNG.standard_normal((fan_in, rank)), RNG.standard_normal((rank, fan_out))
        variables[name] = {
            "lora_A": np.repeat(one_a[:, None], experts, axis=1),
            "lora_B": np.repeat(one_b[None], experts, axis=0),
        }
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), variables)
    x = jnp.asarray(RNG.standard_normal((2, 5, width)), jnp.float32)
    gate, up = (jnp.asarray(RNG.standard_normal((2, 5, ffn_width)), jnp.float32) for _ in range(2))

    def run(jitter, deterministic):
        method = MixLoraConfig(
            rank=rank,
            alpha=6.0,
            target_modules=tuple(shapes),
            num_experts=experts,
            router=TopKRouter(top_k=experts, jitter_noise=jitter),
        )

        def apply(key):
            update, sown = MixLoraFFN(method).apply(
                {"adapters": variables},
                x,
                tiny_program.frozen_ffn(gate, up, width),
                tiny_program.adapter_context(np.ones((2, 5), bool)),
                deterministic=deterministic,
                rngs={"dropout": key},
                mutable=["router"],
            )
            return update, sown

        return jax.jit(apply)(jax.random.key(1))

    (noisy, calm), (noisy_eval, calm_eval) = (
        [run(jitter, deterministic) for jitter in (0.5, 0.0)] for deterministic in (False, True)
    )
    noisy_sums, calm_sums = (
        out[1]["router"]["statistics"].probability_sum for out in (noisy, calm)
    )
    assert np.abs(noisy_sums - calm_sums).max() > 1e-2
    for ours, expected in zip(noisy[0], calm[0], strict=True):
        np.testing.assert_allclose(ours, expected, **ROUNDING)
    jax.tree.map(np.testing.assert_array_equal, noisy_eval, calm_eval)
