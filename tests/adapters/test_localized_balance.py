"""LoRAMoE's localized balance by hand, against PyTorch, and on its way through a training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
import torch
from tolerances import GRADIENT_ROUNDING, ROUNDING

from moe_jax.adapters import METHODS
from moe_jax.adapters.routing.losses import ImportanceCv, LocalizedBalance
from moe_jax.adapters.routing.router import ABSENT
from moe_jax.adapters.routing.statistics import RouterStatistics, router_statistics
from moe_jax.adapters.routing.strategies import SoftRouter
from moe_jax.config.parse import parse, parse_member
from moe_jax.config.run import parse_run_config
from moe_jax.errors import ConfigError
from moe_jax.training.step.step import forward


@jax.jit
def _of_logits(logits, mask, groups, present=None) -> RouterStatistics:
    routing = SoftRouter().route(logits, mask)
    of_tokens = groups[:, None] * mask.astype(groups.dtype)
    return router_statistics(routing, mask, present=present, expert_groups=of_tokens)


def _statistics(weights, groups, present=None, mask=None) -> RouterStatistics:
    """Statistics of sequences of one token each with these expert weights."""
    weights = np.asarray(weights, np.float32)
    present = np.ones(weights.shape[1], bool) if present is None else np.array(present)
    logits = np.where(present, np.log(np.maximum(weights, 1e-30)), ABSENT)[:, None]
    mask = np.ones((len(weights), 1), bool) if mask is None else mask
    return _of_logits(logits.astype(np.float32), mask, np.array(groups), present)


@functools.partial(jax.jit, static_argnames=("delta", "num_groups"))
def _loss(statistics, delta=0.5, num_groups=2):
    loss = LocalizedBalance(coefficient=1.0, delta=delta, num_groups=num_groups)
    return loss.layer_loss(statistics)


TWO = [[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]]


def test_by_hand():
    # delta 1/2: factors 3/2 for a sequence's own half of the experts, 1/2 for the other.
    # Z = (.6, .15, .15, .1) and (.05, .1, .45, .6): sum 2.2, mean .275; squares .99, so variance
    # .12375 - .075625 = .048125, and .048125 / .075625 = 7/11.
    np.testing.assert_allclose(_loss(_statistics(TWO, [0, 1])), 7 / 11, rtol=1e-5)
    # The groups the other way round: Z = (.2, .05, .45, .3) and (.15, .3, .15, .2): sum 1.8, mean
    # .225; squares .335 + .175 = .51, so .06375 - .050625 = .013125, and .2592593 of .050625.
    np.testing.assert_allclose(_loss(_statistics(TWO, [1, 0])), 7 / 27, rtol=1e-5)


@pytest.mark.parametrize(("delta", "own", "other"), [(0.5, 1 / 8, 3 / 8), (-0.5, 3 / 8, 1 / 8)])
def test_the_minimum_gives_the_own_group_the_smaller_share_unless_delta_is_negative(
    delta, own, other
):
    # Shares in the inverse proportion of the factors 3/2 and 1/2, or 1/2 and 3/2.
    weights = [[own, own, other, other], [other, other, own, own]]
    np.testing.assert_allclose(_loss(_statistics(weights, [0, 1]), delta), 0.0, atol=1e-10)
    assert _loss(_statistics(weights, [1, 0]), delta) > 0.5
    assert _loss(_statistics([[0.25] * 4] * 2, [0, 1]), delta) > 0.2


def test_groups_are_equal_and_contiguous():
    # Factors 3/2 and 1/2; only experts 2 and 3 of six are of group 1 of three.
    share = np.array([3, 3, 1, 1, 3, 3]) / 14
    np.testing.assert_allclose(_loss(_statistics([share], [1]), num_groups=3), 0.0, atol=1e-10)
    # Of two groups, group 1 is experts 3, 4 and 5.
    share = np.array([3, 3, 3, 1, 1, 1]) / 12
    np.testing.assert_allclose(_loss(_statistics([share], [1])), 0.0, atol=1e-10)


def test_experts_that_the_layer_does_not_have_are_in_no_group():
    # Two of four experts: group 0 is expert 0 alone.
    statistics = _statistics([[0.25, 0.75, 0.0, 0.0]], [0], present=[True, True, False, False])
    np.testing.assert_allclose(_loss(statistics), 0.0, atol=1e-10)


def test_of_one_sequence_without_delta_it_is_the_squared_coefficient_of_variation():
    statistics = _statistics(TWO[:1], [1])
    # (.4, .1, .3, .2): mean 1/4, variance (.0225 + .0225 + .0025 + .0025) / 4 = .0125; 1/5.
    np.testing.assert_allclose(_loss(statistics, delta=0.0), 0.2, rtol=1e-5)
    cv = ImportanceCv(coefficient=1.0).layer_loss(statistics)
    np.testing.assert_allclose(_loss(statistics, delta=0.0), cv, rtol=1e-6)


def test_padded_tokens_and_rows_of_padding_change_nothing():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5, 4))
    lengths = np.array([5, 2, 0])
    mask = np.arange(5) < lengths[:, None]

    def loss(logits, mask, groups):
        statistics = _of_logits(logits.astype(np.float32), mask, np.array(groups))
        np.testing.assert_array_equal(statistics.sequences.real, mask.any(axis=1))
        return float(_loss(statistics))

    expected = loss(logits, mask, [0, 1, 0])
    junk = np.where(mask[..., None], logits, 7.0 * rng.standard_normal(logits.shape))
    assert loss(junk, mask, [0, 1, 1]) == expected
    np.testing.assert_allclose(loss(logits[:2], mask[:2], [0, 1]), expected, rtol=1e-6)
    assert abs(loss(logits, mask, [1, 1, 0]) - expected) > 1e-2
    assert abs(loss(junk, np.ones_like(mask), [0, 1, 0]) - expected) > 1e-2
    # A sequence's tokens are averaged: one that is as long again is the same sequence.
    twice = np.concatenate([logits[:1], logits[:1]], axis=1)
    alone = loss(logits[:1], mask[:1], [0])
    np.testing.assert_allclose(loss(twice, np.ones((1, 10), bool), [0]), alone, rtol=1e-6)


def test_without_tokens_loss_and_gradient_are_zero():
    empty = _statistics(TWO, [0, 1], mask=np.zeros((2, 1), bool))
    value, gradient = jax.jit(jax.value_and_grad(_loss))(empty)
    assert float(value) == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gradient_equals_torch():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((4, 6, 6)).astype(np.float32)
    groups, lengths = [2, 0, 1, 2], [6, 3, 1, 4]
    mask = np.arange(6) < np.array(lengths)[:, None]

    theirs = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    z = []
    for row, (group, length) in enumerate(zip(groups, lengths, strict=True)):
        share = torch.softmax(theirs[row, :length], dim=-1).mean(dim=0)
        z += [share[e] * (1.3 if e // 2 == group else 0.7) for e in range(6)]
    z = torch.stack(z)
    expected = z.var(correction=0) / z.mean() ** 2
    expected.backward()

    @jax.jit
    @jax.value_and_grad
    def run(logits):
        return _loss(_of_logits(logits, mask, np.array(groups)), delta=0.3, num_groups=3)

    value, gradient = run(logits)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), **GRADIENT_ROUNDING)
    assert np.abs(gradient).max() > 1e-3


def test_layers_are_averaged_or_their_weights_added_up():
    layers = [_statistics(TWO, [0, 1]), _statistics(TWO[::-1], [0, 1])]
    stacked = jax.tree.map(lambda *fields: jnp.stack(fields), *layers)
    # In the second layer the weights are exchanged: 7/27, as above with the groups exchanged.
    per_layer = LocalizedBalance(coefficient=1.0, delta=0.5).total_loss(stacked)
    np.testing.assert_allclose(per_layer, (7 / 11 + 7 / 27) / 2, rtol=1e-5)
    # Q = (.5, .3, .6, .6) of both; Z = (.75, .45, .3, .3) and (.25, .15, .9, .9): sum 4, mean 1/2;
    # squares .945 + 1.705 = 2.65, so .33125 - .25 = .08125, and .325 of .25.
    pooled = LocalizedBalance(coefficient=1.0, delta=0.5, scope="pooled").total_loss(stacked)
    np.testing.assert_allclose(pooled, 0.325, rtol=1e-5)


BALANCED = {"localized_balance": {"coefficient": 0.5}}
COMMON = {"rank": 4, "alpha": 8.0, "losses": BALANCED}
ROUTED = {
    "loramoe": {**COMMON, "target_modules": ("up_proj", "down_proj"), "num_experts": 4},
    "mola": {**COMMON, "target_modules": ("q_proj", "down_proj"), "num_experts": (2, 4)},
    "mixlora": {**COMMON, "target_modules": ("up_proj",), "num_experts": 4},
}
METHODS_BY_NAME = {name: {"name": name, **method} for name, method in ROUTED.items()}


def _step(mesh, batch):
    """The loss and the gradients of a step, and the loss with all rows in group 0."""
    program = tiny_program.program(
        {"mola": METHODS_BY_NAME["mola"]},
        config=tiny_program.model_config(num_layers=2),
        mesh=mesh,
    )
    params = tiny_program.random_params(program)
    adapters = tiny_program.random_adapters(program)
    before = jax.tree.map(np.asarray, adapters)
    losses = []
    for rows in (batch._replace(expert_groups=0 * batch.expert_groups), batch):
        start = jax.device_put(before, program.state_shardings.adapters)
        state = program.init_state(params).replace(adapters=start)
        state, metrics = program.train_step(state, params, program.put_train_batch(rows))
        losses.append(float(metrics["mola/localized_balance"]))
    lost = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.adapters)
    return losses, lost


def test_a_training_step_balances_alike_on_one_device_and_on_eight():
    batch = tiny_program.random_batch(8)
    losses, gradients = _step(None, batch)
    assert min(losses) > 1e-3
    assert abs(losses[0] - losses[1]) > 1e-4  # the groups reach the loss
    sharded, sharded_gradients = _step({"data": 2, "fsdp": 2, "tensor": 2}, batch)
    np.testing.assert_allclose(sharded, losses, **ROUNDING)
    jax.tree.map(
        lambda ours, one: np.testing.assert_allclose(ours, one, **GRADIENT_ROUNDING),
        sharded_gradients,
        gradients,
    )


def test_the_sequences_of_every_method_add_up_to_its_statistics():
    program = tiny_program.program(
        METHODS_BY_NAME, rows=4, config=tiny_program.model_config(num_layers=2)
    )
    batch = tiny_program.random_batch(12)
    groups = np.array([0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0])
    batch = batch._replace(expert_groups=(groups[:, None] * batch.segment_ids).astype(np.int32))
    model = program.model.clone(adapter_rows=program.adapter_rows)
    adapters = tiny_program.random_adapters(program)

    @jax.jit
    def run(params, adapters, batch):
        return forward(model, params, adapters, batch)[1]

    statistics = run(tiny_program.random_params(program), adapters, batch)
    lengths = batch.segment_ids.sum(axis=1)
    for number, name in enumerate(ROUTED):
        rows = slice(4 * number, 4 * number + 4)
        assert statistics[name]
        for site in statistics[name].values():
            np.testing.assert_array_equal(site.sequences.group, [groups[rows]] * 2)
            np.testing.assert_array_equal(site.sequences.real, np.ones((2, 4)))
            total = np.einsum("b,lbe->le", lengths[rows], site.sequences.weights)
            np.testing.assert_allclose(total, site.weight_sum, **ROUNDING)


def test_sequences_are_left_out_where_no_loss_reads_them():
    method = {**METHODS_BY_NAME["loramoe"], "losses": {"router_z": {"coefficient": 1.0}}}
    program = tiny_program.program({"a": method})
    model = program.model.clone(adapter_rows=program.adapter_rows)
    run = lambda *args: forward(model, *args)[1]["a"]
    batch = tiny_program.random_batch(8)
    sites = jax.eval_shape(run, program.abstract_params, program.abstract_state.adapters, batch)
    assert len(sites) == 2
    assert all(site.sequences is None for site in sites.values())


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("delta", {"delta": 1.0}, "must lie in (-1, 1)"),
        ("delta", {"delta": -1.0}, "must lie in (-1, 1)"),
        ("num_groups", {"num_groups": 1}, "must be at least 2"),
        ("coefficient", {"coefficient": -0.1}, "must not be negative"),
        ("deltas", {"deltas": 0.5}, "did you mean 'delta'?"),
    ],
)
def test_bad_settings_are_refused_by_field(field, change, message):
    with pytest.raises(ConfigError) as refused:
        parse(LocalizedBalance, {"coefficient": 1.0, **change}, "loss")
    assert str(refused.value).startswith(f"loss.{field}: ")
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["loramoe", "mixlora"])
def test_experts_that_do_not_divide_into_groups_are_refused(name):
    with pytest.raises(
        ConfigError,
        match=r"^method\.losses\.localized_balance\.num_groups: 5 experts cannot be divided into 2",
    ):
        parse_member(METHODS, {**METHODS_BY_NAME[name], "num_experts": 5}, "method")


def test_data_of_a_group_that_there_is_not_is_refused():
    source = {"path": "unused", "schema": "text"}
    sources = {"facts": source, "tasks": {**source, "expert_group": 2}}
    adapter = {
        "method": METHODS_BY_NAME["loramoe"],
        "data": {"train": sources, "max_length": 16},
        "optimizer": tiny_program.SGD,
        "batch_size": 2,
    }
    raw = {
        "base": {"path": "unused", "param_dtype": "float32"},
        "compute": {"dtype": "float32"},
        "training": {"steps": 1},
        "adapters": {"x": adapter},
    }
    with pytest.raises(
        ConfigError, match=r"^config\.adapters\.x\.data\.train\.tasks\.expert_group: 2, but"
    ):
        parse_run_config(raw, METHODS)
    sources["tasks"]["expert_group"] = -1
    with pytest.raises(ConfigError, match=r"train\.tasks\.expert_group: must not be negative"):
        parse_run_config(raw, METHODS)
    sources["tasks"]["expert_group"] = 1
    assert parse_run_config(raw, METHODS).adapters["x"].data.train["tasks"].expert_group == 1
    sources["tasks"]["expert_group"] = 0
    with pytest.raises(
        ConfigError, match=r"adapters\.x\.data\.train: no data set has expert_group 1"
    ):
        parse_run_config(raw, METHODS)
    # Who has no such loss does not read it.
    adapter["method"] = tiny_program.LORA
    sources["tasks"]["expert_group"] = 7
    parse_run_config(raw, METHODS)
