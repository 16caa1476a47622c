"""MoLA against a plain loop over experts, and against figures recorded from MoE-PEFT."""

import jax
import mixture_oracle
import numpy as np
import pytest
import tiny_program

from moe_jax.adapters import METHODS
from moe_jax.adapters.routing.strategies import TopKRouter
from moe_jax.config.parse import parse_member
from moe_jax.errors import ConfigError

MOLA = {
    "name": "mola",
    "rank": 4,
    "alpha": 8.0,
    "target_modules": tiny_program.ALL_TARGETS,
    "num_experts": (2, 4, 6),
}
CASES = {
    "2-4-6": (
        {"target_modules": ("q_proj", "o_proj", "gate_proj", "down_proj")},
        [2, 4, 6],
    ),
    "dora_4-2-6": (
        {
            "dora": True,
            "num_experts": (4, 2, 6),
            "router": {"name": "top_k", "top_k": 1},
            "target_modules": ("k_proj", "v_proj", "up_proj"),
        },
        [4, 2, 6],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_losses_and_all_gradients_equal_a_loop_over_experts(tmp_path, case):
    # The adapter's leaves are random where a layer has no expert too, and must not matter.
    overrides, counts = CASES[case]
    mixture_oracle.assert_training_step_equals(tmp_path, {**MOLA, **overrides}, counts)


def test_logits_losses_and_gradients_equal_recorded_figures():
    method = parse_member(METHODS, {**MOLA, "num_experts": [4]}, "method")
    assert method.router == TopKRouter(top_k=2)
    mixture_oracle.assert_equals_recorded_figures("mola", method, coefficient=0.01)


def test_experts_that_a_layer_does_not_have_are_zero_and_stay_so():
    # Four layers in two groups: two experts in the lower two, four in the upper two.
    method = {
        **MOLA,
        "num_experts": (2, 4),
        "router": {"name": "top_p", "top_p": 1.0},  # would take all four
        "target_modules": ("q_proj", "down_proj"),
        "losses": {"load_balance": {"coefficient": 0.1}, "router_entropy": {"coefficient": 0.1}},
    }
    program = tiny_program.program(
        {"a": method},
        config=tiny_program.model_config(num_layers=4),
        optimizer={"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1},
    )
    params = tiny_program.random_params(program)
    state = program.init_state(params)
    batch = tiny_program.random_batch(8)
    evaluated, batch = program.put_eval_batch(batch), program.put_train_batch(batch)
    fresh = program.eval_step("a", state.adapters, params, evaluated)
    base = program.eval_step(None, {}, params, evaluated)
    np.testing.assert_allclose(fresh[0], base[0], rtol=1e-6)  # the weights add up to one

    before = jax.tree.map(np.asarray, state.adapters["a"])
    for _ in range(3):
        state, metrics = program.train_step(state, params, batch)
    after = jax.tree.map(np.asarray, state.adapters["a"])
    expert_axis = {"lora_A": 1, "lora_B": 0, "kernel": 1}  # of one layer's leaf
    for layer, count in enumerate([2, 2, 4, 4]):
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        ):
            axis = expert_axis[path[-1].key]
            old, new = (np.moveaxis(leaf[layer], axis, 0) for leaf in (old, new))
            assert not old[count:].any() and not new[count:].any()
            for one, other in zip(old[:count], new[:count], strict=True):
                assert np.abs(one - other).max() > 1e-3  # those that it has do learn

    # The sites one after the other, each with its four layers. All tokens go to all experts that
    # their layer has, so that each of these has an equal share, and the others are not dead.
    load = np.asarray(metrics["a/expert_load"])
    assert load.shape == (8, 4)
    for row, count in zip(load, [2, 2, 4, 4] * 2, strict=True):
        np.testing.assert_allclose(row, [1.0] * count + [np.nan] * (4 - count), rtol=1e-6)
    assert float(metrics["a/dead_experts"]) == 0
    assert (np.asarray(metrics["a/layer_entropy"]) <= 1 + 1e-6).all()


POOLED = {"losses": {"balance": {"name": "load_balance", "coefficient": 1.0, "scope": "pooled"}}}
BY_THREE = {"localized_balance": {"coefficient": 1.0, "num_groups": 3}}


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("num_experts", {"num_experts": ()}, "names no number of experts"),
        ("num_experts", {"num_experts": 4}, "expected a tuple, got int (4)"),
        ("num_experts", {"num_experts": (4, 1)}, "must be at least 2"),
        ("router.top_k", {"router": {"name": "top_k", "top_k": 3}}, "there are only 2"),
        ("router.name", {"router": {"name": "switch", "capacity": 4}}, "use another"),
        ("losses.balance.scope", POOLED, "cannot be pooled; use 'per_layer'"),
        (
            "losses.localized_balance.num_groups",
            {"num_experts": (3, 6, 8), "losses": BY_THREE},
            "8 experts cannot be divided into 3 equal groups",
        ),
    ],
)
def test_contradictions_are_refused_by_field(field, change, message):
    with pytest.raises(ConfigError) as refused:
        parse_member(METHODS, {**MOLA, **change}, "method")
    assert str(refused.value).startswith(f"method.{field}: ")
    assert message in str(refused.value)


def test_groups_must_divide_the_depth():
    with pytest.raises(
        ConfigError,
        match=r"^config\.adapters\.a\.method\.num_experts: the model's 3 layers cannot be divided "
        "into 2 equal groups",
    ):
        tiny_program.program({"a": {**MOLA, "num_experts": (2, 4)}})
    pooled = parse_member(METHODS, {**MOLA, **POOLED, "num_experts": (4, 4, 4)}, "method")
    pooled.check_model(tiny_program.model_config())
