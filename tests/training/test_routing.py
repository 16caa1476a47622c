"""What is reported of routers, from hand-made statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.statistics import RouterStatistics
from moe_jax.training.routing import routing_summary


def _layer(tokens, load, entropy=0.0, present=(1, 1, 1, 1), routed=1, overflow=None):
    """Of one layer, with a leading axis; what the summary does not read is zero."""
    nothing = jnp.zeros((1, 4))
    return RouterStatistics(
        routed=jnp.array([float(routed)]),
        present=jnp.array([present], jnp.float32),
        tokens=jnp.array([float(tokens)]),
        load_sum=jnp.array([load], jnp.float32),
        probability_sum=nothing,
        weight_sum=nothing,
        squared_logsumexp_sum=jnp.zeros(1),
        entropy_sum=jnp.array([entropy]),
        overflow_sum=None if overflow is None else jnp.array([float(overflow)]),
    )


# Ten tokens, two experts each: the third expert has none of them. The entropy is that of a fair
# choice between two experts, which is half of that between four.
UNEVEN = _layer(10, [5, 5, 0, 10], 10 * math.log(2))
# The same tokens where there are two experts only, evenly used; half of the greatest entropy.
TWO = _layer(10, [10, 10, 0, 0], 5 * math.log(2), present=(1, 1, 0, 0))
FROZEN = _layer(0, [0, 0, 0, 0], routed=0)


def test_one_site_by_hand():
    summary = routing_summary({"mlp/moe": UNEVEN})
    # An equal share is 20 / 4.
    np.testing.assert_allclose(summary["expert_load"], [[1, 1, 0, 2]], rtol=1e-6)
    np.testing.assert_allclose(summary["layer_entropy"], [0.5], rtol=1e-6)
    scalars = {name: float(summary[name]) for name in ("busiest_expert", "dead_experts")}
    assert scalars == {"busiest_expert": 2.0, "dead_experts": 1.0}
    assert "overflow" not in summary


def test_sites_and_layers_follow_each_other_and_only_routed_ones_count():
    two_layers = jax.tree.map(lambda *fields: jnp.concatenate(fields), UNEVEN, FROZEN)
    summary = routing_summary({"mlp/up_proj": two_layers, "mlp/down_proj": TWO})
    load = [[1, 1, 0, 2], [0, 0, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_allclose(summary["expert_load"], load, rtol=1e-6)
    np.testing.assert_allclose(summary["layer_entropy"], [0.5, 0.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(summary["mean_entropy"], 0.5, rtol=1e-6)
    # Neither the experts of a frozen layer nor those that a layer does not have are dead.
    assert float(summary["dead_experts"]) == 1.0


def test_overflow_is_a_share_of_tokens():
    layers = {"a": _layer(10, [4, 4, 2, 0], overflow=1), "b": _layer(30, [8, 8, 8, 6], overflow=7)}
    summary = routing_summary(layers)
    np.testing.assert_allclose(summary["layer_overflow"], [1 / 10, 7 / 30], rtol=1e-6)
    np.testing.assert_allclose(summary["overflow"], 8 / 40, rtol=1e-6)


def test_a_batch_of_padding_is_reported_as_nothing():
    summary = routing_summary({"mlp/moe": FROZEN._replace(routed=jnp.ones(1))})
    assert all(np.isfinite(value).all() for value in summary.values())
    assert float(summary["mean_entropy"]) == float(summary["busiest_expert"]) == 0.0
