"""Costs of linear attention in `benchmarks/delta_rule.py`, against sums on paper."""

import pytest

from benchmarks.delta_rule import MODEL, as_markdown, cost_of
from moe_jax.config.attention import LINEAR_ATTENTION, SELF_ATTENTION


@pytest.fixture(scope="module")
def costs():
    kinds = (LINEAR_ATTENTION, SELF_ATTENTION)
    return {n: {kind: cost_of(kind, n) for kind in kinds} for n in (1024, 4096)}


def test_linear_attention_costs_the_same_for_every_token(costs):
    short, long = (costs[length][LINEAR_ATTENTION] for length in costs)
    assert long.flops == pytest.approx(short.flops, rel=0.01)
    assert long.memory < 1.1 * short.memory
    # Besides the states between blocks, the layer keeps a few arrays as wide as its projections.
    assert long.memory < 1.5 * costs[4096][SELF_ATTENTION].memory
    net = MODEL.delta_net
    projections = net.mixed_dim + 2 * net.value_dim + 2 * net.num_value_heads
    # The rest are products with states [128, 128] and within chunks: three forward with a state,
    # three again and six backward, and about as many with the 64 tokens of a chunk.
    rest = long.flops - 4 * MODEL.hidden_size * projections
    states = net.value_dim * net.key_head_dim
    assert 24 * states < rest < 2 * 24 * states


def test_full_attention_grows_by_its_pairs(costs):
    short, long = (costs[length][SELF_ATTENTION] for length in costs)
    pairs = 12 * MODEL.num_heads * MODEL.head_dim * (4096 - 1024) / 2  # half are before a token
    assert 0.9 * pairs < long.flops - short.flops < 2.6 * pairs


def test_table(costs):
    lines = as_markdown(costs).splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 1,024", "| 4,096"]
