"""Routing metrics of hand-made statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import tiny_program

from moe_jax.adapters.routing.statistics import RouterStatistics
from moe_jax.training.step.router_metrics import routing_summary, row_locations


def _layer(tokens, load, entropy=0.0, present=(1, 1, 1, 1), routed=1, overflow=None, effective=()):
    """Statistics of one layer, with a leading axis; fields that are not read are zero."""
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
        weighted_tokens=jnp.array([float(len(effective))]),
        effective_sum=jnp.array([float(sum(effective))]),
        overflow_sum=None if overflow is None else jnp.array([float(overflow)]),
    )


# Ten tokens with two experts each, none of them the third. The entropy is that of a uniform choice
# between two experts, half of that between four.
UNEVEN = _layer(10, [5, 5, 0, 10], 10 * math.log(2))
# The same tokens with two experts, evenly used; half of the maximal entropy.
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


def test_rows_are_sites_and_layers_and_means_are_over_routed_ones():
    two_layers = jax.tree.map(lambda *fields: jnp.concatenate(fields), UNEVEN, FROZEN)
    summary = routing_summary({"mlp/up_proj": two_layers, "mlp/down_proj": TWO})
    nan = math.nan  # absent expert, or one that is not routed to
    load = [[1, 1, 0, 2], [nan, nan, nan, nan], [1, 1, nan, nan]]
    np.testing.assert_allclose(summary["expert_load"], load, rtol=1e-6)
    np.testing.assert_allclose(summary["layer_entropy"], [0.5, 0.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(summary["mean_entropy"], 0.5, rtol=1e-6)
    # Experts of a frozen layer and absent experts are not dead.
    assert float(summary["dead_experts"]) == 1.0


def test_effective_experts_are_means_over_tokens_and_over_layers_with_tokens():
    one = _layer(3, [3, 0, 0, 0], effective=[1.0, 2.0])  # the third token has no expert
    layers = {"a": one, "b": FROZEN, "c": _layer(1, [1, 1, 1, 0], effective=[3.0])}
    summary = routing_summary(layers)
    np.testing.assert_allclose(summary["layer_effective_experts"], [1.5, 0.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(summary["effective_experts"], 2.25, rtol=1e-6)


def test_overflow_is_a_share_of_tokens():
    layers = {"a": _layer(10, [4, 4, 2, 0], overflow=1), "b": _layer(30, [8, 8, 8, 6], overflow=7)}
    summary = routing_summary(layers)
    np.testing.assert_allclose(summary["layer_overflow"], [1 / 10, 7 / 30], rtol=1e-6)
    np.testing.assert_allclose(summary["overflow"], 8 / 40, rtol=1e-6)


def test_a_batch_of_padding_has_zero_metrics():
    summary = routing_summary({"mlp/moe": FROZEN._replace(routed=jnp.ones(1))})
    assert all(np.isfinite(value).all() for value in summary.values())
    assert float(summary["mean_entropy"]) == float(summary["busiest_expert"]) == 0.0


def test_rows_are_ordered_by_site_and_layer():
    places = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert row_locations(["a", "b"], 6) == places


MOLA = {
    "name": "mola",
    "rank": 2,
    "alpha": 4.0,
    "target_modules": ("v_proj", "q_proj", "up_proj"),
    "num_experts": (3,),
}


def test_sites_of_a_program_label_the_rows():
    """Rows of the compiled step's metrics are in the order of `Program.sites`."""
    methods = {"x": MOLA, "y": tiny_program.LORA, "z": tiny_program.MIXLORA}
    program = tiny_program.program(methods, rows=2, config=tiny_program.model_config(num_layers=2))
    assert {name: sorted(sites) for name, sites in program.sites.items()} == {
        "x": ["mlp/up_proj", "self_attn/q_proj", "self_attn/v_proj"],
        "z": ["mlp/moe"],
    }
    places = row_locations(program.sites["x"], 6)
    params = tiny_program.random_params(program)
    batch = program.put_train_batch(tiny_program.random_batch(6))
    for site, layer in (places[1], places[4]):
        state = program.init_state(params).replace(adapters=tiny_program.random_adapters(program))
        block, projection = site.split("/")
        router = state.adapters["x"]["layers"][block][projection]["router"]
        router["kernel"] = router["kernel"].at[layer].set(0.0)
        _, metrics = program.train_step(state, params, batch)
        # With equal logits, all tokens go to the first two of the three experts.
        all_alike = [np.allclose(row, [1.5, 1.5, 0.0]) for row in metrics["x/expert_load"]]
        assert [place for place, alike in zip(places, all_alike, strict=True) if alike] == [
            (site, layer)
        ]
