"""Routing statistics, by hand and against loops over tokens."""

import math

import numpy as np
import pytest
from tolerances import FEW_OPERATIONS, FLOAT64_ROUNDING

from moe_jax.adapters.routing.statistics import TokenRouting
from moe_jax.inspection.routing_report import batch_statistics, merge_statistics, specialisation


def _routing(weights, probabilities=None, load=None, routed=None, present=None):
    weights = np.asarray(weights, float)  # [L, B, S, E]
    layers, experts = weights.shape[0], weights.shape[-1]
    return TokenRouting(
        weights=weights,
        probabilities=weights if probabilities is None else np.asarray(probabilities, float),
        load=(weights > 0).astype(float) if load is None else np.asarray(load, float),
        routed=np.ones(layers) if routed is None else np.asarray(routed, float),
        present=np.ones((layers, experts)) if present is None else np.asarray(present, float),
    )


def test_statistics_by_hand():
    """Four tokens, three experts, at most two per token; the fifth position is padding."""
    weights = [[0.5, 0.5, 0], [0.75, 0.25, 0], [0.5, 0, 0.5], [1.0, 0, 0], [9, 9, 9]]
    load = [[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0], [9, 9, 9]]
    probabilities = [[0.5, 0.5, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25], [9, 9, 9]]
    routing = _routing([[weights]], [[probabilities]], [[load]])
    statistics = batch_statistics(routing, np.array([[True] * 4 + [False]]))
    assert (statistics.rows, statistics.tokens) == (1, 4)
    # 7 visits: 4 to expert 0, 2 to expert 1, 1 to expert 2; an equal share is 7/3.
    np.testing.assert_array_equal(statistics.load_sum, [[4, 2, 1]])
    np.testing.assert_allclose(statistics.load, [[12 / 7, 6 / 7, 3 / 7]], **FLOAT64_ROUNDING)
    np.testing.assert_allclose(statistics.share, [[4 / 7, 2 / 7, 1 / 7]], **FLOAT64_ROUNDING)
    # Weights add up to 2.75, 0.75 and 0.5, of 4.
    np.testing.assert_allclose(
        statistics.weight, [[3 * 2.75 / 4, 3 * 0.75 / 4, 3 * 0.5 / 4]], **FLOAT64_ROUNDING
    )
    # Pairs: 0 and 1 on two tokens, 0 and 2 on one, 1 and 2 on none; their mean is 1.
    nan = math.nan
    np.testing.assert_array_equal(
        statistics.coactivation, [[[nan, 2, 1], [2, nan, 0], [1, 0, nan]]]
    )
    np.testing.assert_array_equal(
        statistics.together, [[[1, 0.5, 0.25], [0.5, 0.5, 0], [0.25, 0, 0.25]]]
    )
    # ln 2, 0, ln 3 and 1.5 ln 2 nats.
    nats = [[math.log(2), 0, math.log(3), 1.5 * math.log(2)]]
    np.testing.assert_allclose(statistics.entropies, nats, **FEW_OPERATIONS)
    np.testing.assert_allclose(statistics.entropy, np.mean(nats) / math.log(3), **FEW_OPERATIONS)
    # KL((4, 2, 1) / 7 || 1/3) in bits.
    expected = sum(p * math.log2(3 * p) for p in (4 / 7, 2 / 7, 1 / 7))
    np.testing.assert_allclose(statistics.imbalance, [expected], **FLOAT64_ROUNDING)
    # 2, 1 / (9/16 + 1/16) = 1.6, 2 and 1 effective experts.
    np.testing.assert_allclose(statistics.effective_experts, [6.6 / 4], **FLOAT64_ROUNDING)
    assert statistics.dead_experts == []


def test_absent_experts_are_nan():
    """Layer 0 has no router; layer 1 has two of three experts, one of them without tokens."""
    weights = np.zeros((2, 1, 2, 3))
    weights[1, 0, :, 0] = 1
    routing = _routing(weights, routed=[0, 1], present=[[1, 1, 1], [1, 1, 0]])
    statistics = batch_statistics(routing, np.ones((1, 2), bool))
    nan = math.nan
    np.testing.assert_array_equal(statistics.load, [[nan, nan, nan], [2, 0, nan]])
    assert statistics.dead_experts == [(1, 1)]
    assert np.isnan(statistics.entropy[0]) and statistics.entropy[1] == 0
    np.testing.assert_array_equal(statistics.effective_experts, [nan, 1])
    assert np.isnan(statistics.coactivation).all()  # one expert a token
    np.testing.assert_array_equal(statistics.imbalance, [nan, 1])  # all on one of two: log2 2 bits
    assert np.isnan(statistics.relative_entropies[0]).all()


def test_specialisation_of_distinct_overlapping_and_equal_data_sets():
    """Three layers, two data sets of two tokens each, one expert per token."""
    first = np.zeros((3, 1, 2, 2))
    second = np.zeros((3, 1, 2, 2))
    first[0, ..., 0], second[0, ..., 1] = 1, 1  # a different expert for each data set
    first[1, 0, 0, 0], first[1, 0, 1, 1], second[1, ..., 0] = 1, 1, 1
    first[2, 0, 0, 0], first[2, 0, 1, 1] = 1, 1
    second[2] = first[2]
    mask = np.ones((1, 2), bool)
    parts = [batch_statistics(_routing(weights), mask) for weights in (first, second)]
    # Layer 1: H(3/4, 1/4) - (H(1/2, 1/2) + H(1)) / 2 bits.
    partly = (0.75 * math.log2(4 / 3) + 0.25 * 2) - 0.5
    np.testing.assert_allclose(specialisation(parts), [1, partly, 0], **FLOAT64_ROUNDING)
    total = merge_statistics(parts)
    np.testing.assert_array_equal(total.load, [[1, 1], [1.5, 0.5], [1, 1]])
    assert (total.rows, total.tokens, total.entropies.shape) == (2, 4, (3, 4))


@pytest.mark.parametrize("kind", ["top_2", "soft"])
def test_against_a_loop_over_tokens(kind):
    rng = np.random.default_rng(0)
    layers, rows, length, experts = 2, 3, 5, 4
    probabilities = rng.dirichlet(np.ones(experts), (layers, rows, length))
    mask = np.arange(length)[None] < np.array([[5], [2], [3]])
    weights, load = np.zeros_like(probabilities), np.zeros_like(probabilities)
    loads, pairs = np.zeros((layers, experts)), np.zeros((layers, experts, experts))
    entropies = [[] for _ in range(layers)]
    effective = [[] for _ in range(layers)]
    for layer in range(layers):
        for row, position in np.argwhere(mask):
            probs = probabilities[layer, row, position]
            chosen = sorted(np.argsort(probs)[-2:]) if kind == "top_2" else range(experts)
            for expert in chosen:
                weights[layer, row, position, expert] = probs[expert] / sum(
                    probs[e] for e in chosen
                )
                load[layer, row, position, expert] = 1 if kind == "top_2" else probs[expert]
                loads[layer, expert] += load[layer, row, position, expert]
            for a in chosen:
                for b in chosen:
                    token_load = load[layer, row, position]
                    pairs[layer, a, b] += token_load[a] * token_load[b]
            effective[layer].append(1 / sum(w**2 for w in weights[layer, row, position]))
            entropies[layer].append(-sum(p * math.log(p) for p in probs))
    statistics = batch_statistics(_routing(weights, probabilities, load), mask)
    np.testing.assert_allclose(statistics.load_sum, loads, **FLOAT64_ROUNDING)
    np.testing.assert_allclose(statistics.together_sum, pairs, **FLOAT64_ROUNDING)
    np.testing.assert_allclose(statistics.entropies, entropies, **FEW_OPERATIONS)
    np.testing.assert_allclose(
        statistics.effective_experts, np.mean(effective, axis=1), **FLOAT64_ROUNDING
    )
    np.testing.assert_allclose(np.nansum(statistics.load, axis=1), [4, 4], **FLOAT64_ROUNDING)
    np.testing.assert_allclose(
        np.nanmean(statistics.coactivation, axis=(1, 2)), [1, 1], **FLOAT64_ROUNDING
    )
