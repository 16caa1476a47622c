"""Routing statistics by hand, without the padding, and never missing in silence."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program

from moe_jax.adapters import METHODS
from moe_jax.adapters.routing import SoftRouter, SwitchRouter, TopKRouter, TopPRouter
from moe_jax.adapters.routing.statistics import (
    collect_statistics,
    effective_experts,
    router_statistics,
)
from moe_jax.adapters.rows import divide_rows
from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import parse_member
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.step import _router_terms

PROBABILITIES = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.9, 0.05, 0.05]])
LOG_PARTITION = np.array([[2.0], [-1.0], [7.0]])
MASK = jnp.array([[True, True, False]])


def _statistics(probabilities, log_partition, mask, **layer):
    """Router logits of one row with the given softmax and log-partition function."""
    logits = jnp.asarray(np.log(probabilities) + log_partition, jnp.float32)[None]
    route = TopKRouter(top_k=2).route
    return jax.jit(lambda x, m: router_statistics(route(x, m), m, **layer))(logits, mask)


def _sums(statistics):
    """Without what describes the layer."""
    return statistics._replace(routed=None, present=None)


def test_sums_by_hand():
    sums = _statistics(PROBABILITIES, LOG_PARTITION, MASK)
    assert float(sums.tokens) == 2
    # Token 0 chooses experts 0 and 1, token 1 experts 2 and 0 (of the equal 0 and 1, the lower).
    np.testing.assert_array_equal(sums.load_sum, [2, 1, 1])
    np.testing.assert_allclose(sums.probability_sum, [0.6, 0.4, 1.0], rtol=1e-6)
    # Weights: 5/8 and 3/8 of token 0, 8/9 and 1/9 of token 1.
    np.testing.assert_allclose(sums.weight_sum, [5 / 8 + 1 / 9, 3 / 8, 8 / 9], rtol=1e-6)
    np.testing.assert_allclose(sums.squared_logsumexp_sum, 2.0**2 + (-1.0) ** 2, rtol=1e-6)
    # 0.5 ln 2 + 0.3 ln (10/3) + 0.2 ln 5, and 0.2 ln 10 + 0.8 ln 1.25
    entropy = 0.5 * math.log(2) + 0.3 * math.log(10 / 3) + 0.2 * math.log(5)
    entropy += 0.2 * math.log(10) + 0.8 * math.log(1.25)
    np.testing.assert_allclose(sums.entropy_sum, entropy, rtol=1e-6)


@pytest.mark.parametrize(
    "router",
    [
        TopKRouter(top_k=1),
        TopKRouter(top_k=3),
        TopPRouter(top_p=0.7, renormalise=False),
        SoftRouter(),
        SwitchRouter(capacity=1),
    ],
    ids=lambda router: type(router).__name__,
)
def test_effective_experts_against_a_loop_over_tokens(router):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0.0, 2.0, (2, 6, 4)), jnp.float32)
    mask = np.arange(6)[None] < np.array([[6], [3]])
    routing = router.route(logits, jnp.asarray(mask))
    weights, numbers = np.asarray(routing.combine, np.float64), []
    for row, position in np.argwhere(mask):
        total = sum(weights[row, position])
        if total > 0:
            numbers.append(1 / sum((w / total) ** 2 for w in weights[row, position]))
    sums = router_statistics(routing, jnp.asarray(mask))
    assert float(sums.weighted_tokens) == len(numbers)
    np.testing.assert_allclose(sums.effective_sum, sum(numbers), rtol=1e-6)
    bound = router.top_k if isinstance(router, TopKRouter) else 4
    assert min(numbers) >= 1 - 1e-6 and max(numbers) <= bound + 1e-6
    if isinstance(router, SwitchRouter):  # tokens beyond the capacity have no expert
        assert len(numbers) < mask.sum() and set(np.round(numbers, 6)) == {1.0}


def test_effective_experts_of_tiny_and_zero_weights():
    weights = jnp.array([[1e-30, 1e-30, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    np.testing.assert_allclose(effective_experts(weights), [2, 0, 1], rtol=1e-6)


def test_what_stands_in_padding_changes_nothing():
    junk = np.array([[0.02, 0.9, 0.08]])
    other = _statistics(
        np.concatenate([PROBABILITIES[:2], junk]),
        np.concatenate([LOG_PARTITION[:2], [[-40.0]]]),
        MASK,
    )
    jax.tree.map(
        np.testing.assert_array_equal, other, _statistics(PROBABILITIES, LOG_PARTITION, MASK)
    )


def test_statistics_add_up_over_parts_of_a_batch():
    whole = _statistics(PROBABILITIES, LOG_PARTITION, jnp.ones((1, 3), bool))
    parts = [
        _statistics(PROBABILITIES[part], LOG_PARTITION[part], jnp.ones((1, n), bool))
        for part, n in ((slice(0, 1), 1), (slice(1, 3), 2))
    ]
    summed = jax.tree.map(jnp.add, *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), _sums(whole), _sums(summed)
    )


def test_a_batch_of_padding_only_counts_nothing():
    sums = _statistics(PROBABILITIES, LOG_PARTITION, jnp.zeros((1, 3), bool))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(_sums(sums)))


def test_a_layer_says_whether_it_routes_and_which_experts_it_has():
    sums = _statistics(PROBABILITIES, LOG_PARTITION, MASK)
    assert float(sums.routed) == 1 and float(sums.num_experts) == 3
    np.testing.assert_array_equal(sums.present, [1, 1, 1])
    present = jnp.array([True, True, False])
    fewer = _statistics(PROBABILITIES, LOG_PARTITION, MASK, present=present)
    np.testing.assert_array_equal(fewer.present, [1, 1, 0])
    assert float(fewer.num_experts) == 2
    # A layer that is left frozen reports no token, whatever its router says.
    frozen = _statistics(PROBABILITIES, LOG_PARTITION, MASK, routed=jnp.array(False))
    assert float(frozen.routed) == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(_sums(frozen)))


def test_the_load_carries_no_gradient():
    logits = jnp.asarray(np.log(PROBABILITIES), jnp.float32)[None]

    def total(logits, field):
        routing = TopKRouter(top_k=2).route(logits, MASK)
        shared = routing._replace(load=routing.combine)  # a load that depends on the logits
        return jnp.sum(getattr(router_statistics(shared, MASK), field) * jnp.arange(3.0))

    assert not jax.grad(total)(logits, "load_sum").any()
    assert jax.grad(total)(logits, "weight_sum").any()


def test_pooling_adds_up_sums_and_keeps_what_describes_the_layers():
    layer = _statistics(PROBABILITIES, LOG_PARTITION, MASK)
    pooled = jax.tree.map(lambda field: jnp.stack([field] * 3), layer).pooled()
    jax.tree.map(
        lambda one, all_: np.testing.assert_allclose(all_, 3 * one, rtol=1e-6),
        _sums(layer),
        _sums(pooled),
    )
    assert float(pooled.routed) == 1
    np.testing.assert_array_equal(pooled.present, [1, 1, 1])


def _method(fields, **overrides):
    return parse_member(METHODS, {**fields, **overrides}, "method")


@pytest.fixture(scope="module")
def model():
    routed = _method(tiny_program.MIXLORA, target_modules=["up_proj"])
    plain = _method(tiny_program.LORA, target_modules=["q_proj"])
    adapter_rows = divide_rows({"x": routed, "y": plain, "z": routed}, {"x": 2, "y": 2, "z": 2})
    return LlamaForCausalLM(
        tiny_program.model_config(), ComputeConfig(dtype="float32"), adapter_rows
    )


@pytest.fixture(scope="module")
def forward(model):
    """The model on random parameters: what `apply` returns besides logits, given `mutable`."""
    tokens = jnp.asarray(tiny_program.random_batch(6).tokens)
    rngs = {"params": jax.random.key(0), "adapters": jax.random.key(1)}
    shapes = nn.meta.unbox(jax.eval_shape(model.init, rngs, tokens))
    rng = np.random.default_rng(0)
    variables = {
        name: jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape), shapes[name])
        for name in ("params", "adapters")
    }
    return lambda mutable: model.apply(variables, tokens, mutable=mutable)[1]


def test_every_layer_of_every_routed_adapter_reports(forward):
    statistics = collect_statistics(jax.jit(lambda: forward(["router"]))())
    assert sorted(statistics) == ["x", "z"]
    for sites in statistics.values():
        assert list(sites) == ["mlp/moe"]
        site = sites["mlp/moe"]
        np.testing.assert_array_equal(site.routed, [1] * 3)
        np.testing.assert_array_equal(site.present, np.ones((3, 4)))
        np.testing.assert_array_equal(site.tokens, [2 * 16] * 3)  # of each of three layers
        assert site.load_sum.shape == (3, 4)
        np.testing.assert_array_equal(site.load_sum.sum(axis=-1), [2 * 2 * 16] * 3)
        np.testing.assert_allclose(site.probability_sum.sum(axis=-1), [2 * 16] * 3, rtol=1e-6)
        np.testing.assert_allclose(site.weight_sum.sum(axis=-1), [2 * 16] * 3, rtol=1e-6)


def test_a_collection_that_was_not_asked_for_is_missed(forward):
    sown = jax.eval_shape(lambda: forward(["cache"]))
    with pytest.raises(ValueError, match="no 'router' collection was sown"):
        collect_statistics(sown)


def test_a_routed_adapter_without_statistics_is_missed(model):
    with pytest.raises(ValueError, match="'x' routes, but sowed no statistics"):
        _router_terms(model.adapter_rows[0], {}, 1)
    total, metrics = _router_terms(model.adapter_rows[1], {}, 1)
    assert float(total) == 0 and metrics == {}


def test_every_layer_and_adapter_draws_its_own_jitter():
    # A base of zeros adds nothing to the residual stream, so that every layer's router sees the
    # same; with the same kernels only jitter tells layers and adapters apart.
    router = {"name": "top_k", "jitter_noise": 0.3}
    routed = _method(tiny_program.MIXLORA, target_modules=["up_proj"], router=router)
    adapter_rows = divide_rows({"x": routed, "z": routed}, {"x": 1, "z": 1})
    config = tiny_program.model_config()
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"), adapter_rows)
    tokens = jnp.tile(jnp.arange(8), (2, 1))
    keys = {name: jax.random.key(0) for name in ("params", "adapters")}
    shapes = nn.meta.unbox(jax.eval_shape(model.init, keys, tokens))
    kernel = np.random.default_rng(0).standard_normal((48, 4))

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        filled = kernel if "'router'" in name else float("'scale'" in name)
        table = np.random.default_rng(1).standard_normal(shape.shape)
        return table if "'embedding'" in name else np.broadcast_to(filled, shape.shape)

    variables = {
        name: jax.tree_util.tree_map_with_path(leaf, shapes[name])
        for name in ("params", "adapters")
    }

    def sums(deterministic):
        rngs = {"dropout": jax.random.key(5)}
        apply = lambda: model.clone(deterministic=deterministic).apply(
            variables, tokens, rngs=rngs, mutable=["router"]
        )
        sites = collect_statistics(jax.jit(apply)()[1])
        return np.concatenate([sites[name]["mlp/moe"].probability_sum for name in ("x", "z")])

    calm, noisy = sums(True), sums(False)  # [2 * L, E]
    np.testing.assert_allclose(calm, np.broadcast_to(calm[0], calm.shape), rtol=1e-6)
    for one, other in itertools.combinations(noisy, 2):
        assert np.abs(one - other).max() > 1e-2
