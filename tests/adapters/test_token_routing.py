"""Every token's routing: its numbers, what it costs, and that it is never missing in silence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import ROUNDING

from moe_jax.adapters import METHODS
from moe_jax.adapters.routing import statistics as statistics_module
from moe_jax.adapters.routing.statistics import collect_routing, collect_statistics
from moe_jax.adapters.tree import to_collection
from moe_jax.config.parse import parse_member

_FFN = {**tiny_program.MIXLORA, "losses": {}}
_MOLA = {
    "name": "mola",
    "rank": 2,
    "alpha": 4.0,
    "num_experts": (2, 3, 4),
    "target_modules": ("q_proj", "down_proj"),
}
METHODS_BY_SITE = {
    "top_k": (_FFN, {"mlp/moe"}),
    "top_p": ({**_FFN, "router": {"name": "top_p", "top_p": 0.7}}, {"mlp/moe"}),
    "switch": (
        {**_FFN, "router": {"name": "switch", "capacity": 2, "sparse_step": 2}},
        {"mlp/moe"},
    ),
    "soft": ({**_FFN, "router": {"name": "soft"}}, {"mlp/moe"}),
    "loramoe": (
        {**_FFN, "name": "loramoe", "router": {"name": "soft"}},
        {"mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"},
    ),
    "mola": (_MOLA, {"self_attn/q_proj", "mlp/down_proj"}),
}


def _segmented(program):
    return program.model.clone(adapter_rows=program.adapter_rows)


def _sown(method, mutable):
    """Collections that a model of three layers sows for two rows, one of them padded."""
    program = tiny_program.program({"x": method}, rows=2)
    batch = tiny_program.random_batch(2)
    _, sown = _segmented(program).apply(
        {
            "params": tiny_program.random_params(program),
            "adapters": to_collection(tiny_program.random_adapters(program)),
        },
        batch.tokens,
        positions=batch.positions,
        token_mask=batch.segment_ids != 0,
        mutable=mutable,
    )
    return sown, batch


@pytest.mark.parametrize("name", METHODS_BY_SITE)
def test_sums_over_tokens_are_the_statistics_of_training(name):
    method, sites = METHODS_BY_SITE[name]
    sown, batch = _sown(method, ["router", "routing"])
    found, statistics = collect_routing(sown)["x"], collect_statistics(sown)["x"]
    assert set(found) == set(statistics) == sites
    padding = np.asarray(batch.segment_ids) == 0
    assert padding.any()
    for site, tokens in found.items():
        tokens = jax.tree.map(np.asarray, tokens)
        experts = 4
        assert tokens.weights.shape == (3, 2, 16, experts)
        expected = statistics[site]
        for field, total in (
            (tokens.load, expected.load_sum),
            (tokens.weights, expected.weight_sum),
            (tokens.probabilities, expected.probability_sum),
        ):
            assert not field[:, padding].any()
            np.testing.assert_allclose(field.sum((1, 2)), total, **ROUNDING)
        np.testing.assert_array_equal(tokens.present, expected.present)
        np.testing.assert_array_equal(tokens.routed, expected.routed)
        probs = tokens.probabilities
        entropy = -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum((1, 2, 3))
        np.testing.assert_allclose(entropy, expected.entropy_sum, rtol=1e-4)
    if name == "switch":  # layers 0 and 2 stay frozen
        assert tokens.routed.tolist() == [0, 1, 0]
        assert not tokens.weights[0].any() and tokens.weights[1].any()
        # A token beyond its expert's capacity of 2 chose it and got none of it.
        assert (tokens.load.sum(-1) > tokens.weights.astype(bool).sum(-1)).any()
    if name == "mola":  # a group of layers each: 2, 3 and 4 experts
        assert tokens.present.sum(-1).tolist() == [2, 3, 4]
        assert not tokens.weights[0, ..., 2:].any() and tokens.weights[2, ..., 3].any()


def test_by_hand():
    """Two tokens, three experts, top-2, and a position of padding."""
    method = parse_member(METHODS, {**_FFN, "num_experts": 3}, "method")
    width = 4
    x = jnp.zeros((1, 3, width)).at[0, 0, 0].set(1.0).at[0, 1, 1].set(1.0).at[0, 2, 2].set(1.0)
    # Logits ln of (1, 2, 1) for the first token and of (6, 1, 3) for the second.
    kernel = jnp.log(jnp.array([[1.0, 2, 1], [6, 1, 3], [1, 1, 1], [1, 1, 1]]))
    ffn = tiny_program.frozen_ffn(jnp.ones((1, 3, 5)), jnp.ones((1, 3, 5)), width)
    context = tiny_program.adapter_context([[True, True, False]])
    module = method.mlp_adapter()
    assert module is not None
    made = jax.eval_shape(
        lambda: module.init({"adapters": jax.random.key(0)}, x, ffn, context, deterministic=True)
    )
    assert "routing" not in made
    adapters = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nn.meta.unbox(made["adapters"]))
    adapters["router"]["kernel"] = kernel
    _, sown = module.apply(
        {"adapters": adapters}, x, ffn, context, deterministic=True, mutable=["routing"]
    )
    tokens = sown["routing"]["tokens"]
    expected = [[1 / 3, 2 / 3, 0], [6 / 9, 0, 3 / 9], [0, 0, 0]]
    np.testing.assert_allclose(tokens.weights[0], expected, **ROUNDING)
    np.testing.assert_allclose(
        tokens.probabilities[0], [[0.25, 0.5, 0.25], [0.6, 0.1, 0.3], [0, 0, 0]], **ROUNDING
    )
    np.testing.assert_array_equal(tokens.load[0], [[1, 1, 0], [1, 0, 1], [0, 0, 0]])


def test_training_does_not_sow_token_routing(monkeypatch):
    # Of both kinds of routers, in one step.
    methods = {name: METHODS_BY_SITE[name][0] for name in ("top_k", "mola")}

    def lowered():
        return tiny_program.program(methods, rows=2).lower_train_step(16).as_text()

    with_it = lowered()
    # `None` in its place would fail where it was called.
    monkeypatch.setattr(statistics_module, "token_routing", None)
    assert lowered() == with_it
    assert "dot_general" in with_it


def test_sowing_token_routing_changes_the_program():
    program = tiny_program.program({"x": _FFN}, rows=2)
    batch = tiny_program.random_batch(2)

    def lowered(mutable):
        def run(params, adapters):
            return _segmented(program).apply(
                {"params": params, "adapters": to_collection(adapters)},
                batch.tokens,
                mutable=mutable,
            )

        abstract = program.abstract_params, program.abstract_state.adapters
        return jax.jit(run).lower(*abstract).as_text()

    assert len(lowered(["router", "routing"])) > len(lowered(["router"]))


def test_a_collection_that_is_not_there_is_a_defect():
    with pytest.raises(ValueError, match="no 'routing' collection was sown"):
        collect_routing(_sown(tiny_program.LORA, ["routing"])[0])
