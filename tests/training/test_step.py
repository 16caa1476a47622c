"""The whole training step, on a model with two layers and two adapters."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import GRADIENT_ROUNDING, ROUNDING

from moe_jax.adapters.rows import AdapterRows
from moe_jax.data.batch import Batch
from moe_jax.training.step.loss import row_losses
from moe_jax.training.step.optimizer import finite_check_state, initial_loss_scale
from moe_jax.training.step.step import eval_step, forward

# No width equals another's, or a product of the adapters' ranks, so that shapes tell leaves apart.
MODEL = tiny_program.model_config(
    num_layers=2, hidden_size=32, intermediate_size=56, num_heads=4, num_kv_heads=2, head_dim=12
)
TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")
MIXLORA = {
    **tiny_program.MIXLORA,
    "target_modules": TARGETS,
    "losses": {"load_balance": {"coefficient": 0.0}},
}
LORA = {**tiny_program.LORA, "target_modules": TARGETS}
METHODS = {"x": MIXLORA, "y": LORA}
# A large epsilon: rounding of gradients near zero must not flip the sign of a whole step.
ADAMW = {"learning_rate": 1e-2, "eps": 1e-3, "weight_decay": 0.01}
ROWS = 4

_program = functools.partial(tiny_program.program, rows=ROWS, config=MODEL)


def _state(program, adapters=None):
    """State at step 0 with random adapters, on the device; the step donates it."""
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    adapters = tiny_program.random_adapters(program) if adapters is None else adapters
    scale = program.config.training.initial_loss_scale
    scales = {name: initial_loss_scale(scale) for name in state.loss_scale}
    state = state.replace(adapters=adapters, loss_scale=scales)
    return jax.device_put(jax.tree.map(np.array, state), program.state_shardings)


def _numpy(tree):
    return jax.tree.map(np.array, tree)


def _assert_equal(ours, theirs, **tolerance):
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, **tolerance, err_msg=jax.tree_util.keystr(path)
        ),
        ours,
        theirs,
    )


def _with_leaf(adapters, name, value):
    """Copy of the adapters, with one number in a leaf of `name` replaced."""
    adapters = _numpy(adapters)
    adapters[name]["layers"]["self_attn"]["q_proj"]["lora_B"][1, 2, 3] = value
    return adapters


@pytest.fixture(scope="module")
def both():
    return _program(METHODS, optimizer=ADAMW)


@pytest.fixture(scope="module")
def params(both):
    return tiny_program.random_params(both)


@pytest.fixture(scope="module")
def batches():
    """Three batches with one to fifteen targets in each row."""
    made = [tiny_program.random_batch(2 * ROWS, seed=seed) for seed in (2, 3, 4)]
    for batch in made:
        batch.loss_mask[1::2] &= np.arange(16) == 5
    return made


@pytest.fixture(scope="module")
def trained(both, params, batches):
    """Both adapters after each of three steps, and the metrics of each step."""
    state, history = _state(both), []
    for batch in batches:
        state, metrics = both.train_step(state, params, both.put_train_batch(batch))
        history.append((_numpy(state), _numpy(metrics)))
    return history


def test_a_fresh_state_is_zero_except_weights(both, params):
    state = both.init_state(params)
    assert int(state.step) == 0
    assert state.loss_scale == {}
    chains = jax.tree.leaves(
        [finite_check_state(state.opt_state, name).inner_state for name in METHODS]
    )
    assert all(not np.asarray(leaf).any() for leaf in chains)


@pytest.mark.parametrize("name", METHODS)
def test_adapters_that_train_together_equal_each_alone(name, both, params, batches, trained):
    alone = _program({name: METHODS[name]}, optimizer=ADAMW)
    state = _state(alone, {name: tiny_program.random_adapters(both)[name]})
    rows = slice(0, ROWS) if name == "x" else slice(ROWS, None)
    for batch, (together, their_metrics) in zip(batches, trained, strict=True):
        own_rows = Batch(*(array[rows] for array in batch))
        state, metrics = alone.train_step(state, params, alone.put_train_batch(own_rows))
        _assert_equal(state.adapters[name], together.adapters[name], **ROUNDING)
        for metric, value in metrics.items():
            if metric.startswith(f"{name}/"):
                np.testing.assert_allclose(
                    value, their_metrics[metric], rtol=1e-4, atol=1e-6, err_msg=metric
                )
    # Compiled once for all steps and batches; another row length is another program.
    assert list(alone.compiled) == [16]
    if name == "y":
        short = Batch(*(array[:, :8] for array in own_rows))
        alone.train_step(state, params, alone.put_train_batch(short))
        assert len(alone.compiled) == 2


def test_one_compilation_serves_all_steps(both, trained):
    assert [int(state.step) for state, _ in trained] == [1, 2, 3]
    assert list(both.compiled) == [16]


def test_metrics_by_hand(batches, trained):
    _, metrics = trained[0]
    batch = batches[0]
    assert metrics["x/target_tokens"] == batch.loss_mask[:ROWS, 1:].sum()
    assert metrics["y/target_tokens"] == batch.loss_mask[ROWS:, 1:].sum()
    assert metrics["tokens"] == (batch.segment_ids != 0).sum()
    np.testing.assert_allclose(
        metrics["padding_share"], (batch.segment_ids == 0).mean(), rtol=0, atol=1e-6
    )
    for name in METHODS:
        assert metrics[f"{name}/skipped_in_a_row"] == metrics[f"{name}/skipped_total"] == 0
        assert np.isfinite(metrics[f"{name}/grad_norm"]) and metrics[f"{name}/grad_norm"] > 0
    assert 0 < metrics["x/mean_entropy"] <= 1
    assert 1 <= metrics["x/busiest_expert"] <= 4
    assert 0 <= metrics["x/dead_experts"] < 4 * 2
    assert not any(metric.startswith("y/") and "router" in metric for metric in metrics)
    assert "x/loss_scale" not in metrics


def test_the_base_is_never_written(both, params, batches):
    before = _numpy(params)
    both.train_step(_state(both), params, both.put_train_batch(batches[0]))
    jax.tree.map(np.testing.assert_array_equal, params, before)


def _products(lowered):
    """Sorted result shapes of all matrix products."""
    results = re.findall(r"stablehlo\.dot_general.*-> tensor<([0-9x]+)x\w+>", lowered.as_text())
    assert len(results) > 20
    return {tuple(sorted(int(size) for size in result.split("x"))) for result in results}


def test_the_base_has_no_gradient(both, batches):
    layers = both.abstract_params["layers"]
    kernels = [layers["self_attn"][f"{name}_proj"]["kernel"] for name in "qkvo"]
    kernels += [layers["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down")]
    shapes = {tuple(sorted(kernel.shape[1:])) for kernel in kernels}
    shapes.add(tuple(sorted(both.abstract_params["lm_head"]["kernel"].shape)))
    assert shapes == {(32, 48), (24, 32), (32, 56), (32, 96)}

    assert not shapes & _products(both.lower_train_step(16))

    # These products occur if the base is differentiated.
    rows_of_y = AdapterRows("y", both.config.adapters["y"].method, 0, 2 * ROWS)
    model = both.model.clone(adapter_rows=(rows_of_y,))

    def loss(params, adapters, batch):
        logits, _ = forward(model, params, {"y": adapters["y"]}, batch, tiny_program.logits_head)
        return row_losses(logits, batch)[0].sum()

    def of_evaluation(params, adapters, batch):
        return eval_step(model, {"y": adapters["y"]}, params, batch)[0]

    arguments = both.abstract_params, both.abstract_state.adapters, batches[0]
    with jax.set_mesh(both.mesh):
        assert shapes <= _products(jax.jit(jax.grad(loss)).lower(*arguments))
        # The loss of training and evaluation has no such gradient, and raises.
        with pytest.raises(ValueError, match="the head is frozen"):
            jax.eval_shape(jax.grad(of_evaluation), *arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_of_one_adapter_is_skipped_and_counted(
    bad, both, params, batches, trained
):
    adapters = tiny_program.random_adapters(both)
    broken = _with_leaf(adapters, "x", bad)
    state, batch = _state(both, broken), both.put_train_batch(batches[0])
    for times in (1, 2):
        before = _numpy(state)
        state, metrics = both.train_step(state, params, batch)
        jax.tree.map(np.testing.assert_array_equal, state.adapters["x"], broken["x"])
        ours, theirs = (finite_check_state(s.opt_state, "x").inner_state for s in (state, before))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert int(metrics["x/skipped_in_a_row"]) == int(metrics["x/skipped_total"]) == times
        assert int(metrics["y/skipped_in_a_row"]) == int(metrics["y/skipped_total"]) == 0
        assert int(state.step) == times
        if times == 1:
            expected, healthy = trained[0]
            _assert_equal(state.adapters["y"], expected.adapters["y"], **ROUNDING)
            np.testing.assert_allclose(metrics["y/loss"], healthy["y/loss"], rtol=1e-6)

    # The same weights without the bad number: the consecutive count restarts, the total stays.
    healed = state.replace(adapters={**state.adapters, "x": jax.tree.map(jnp.array, adapters["x"])})
    healed = jax.device_put(_numpy(healed), both.state_shardings)
    state, metrics = both.train_step(healed, params, batch)
    assert int(metrics["x/skipped_in_a_row"]) == 0
    assert int(metrics["x/skipped_total"]) == 2
    _assert_equal(state.adapters["x"], trained[0][0].adapters["x"], **ROUNDING)


def test_a_non_finite_base_stops_every_adapter(both, params, batches):
    broken = _numpy(params)
    broken["norm"]["scale"][0] = np.inf
    broken = jax.device_put(broken, both.param_shardings)
    start = _state(both)
    before = _numpy(start.adapters)
    state, metrics = both.train_step(start, broken, both.put_train_batch(batches[0]))
    jax.tree.map(np.testing.assert_array_equal, state.adapters, before)
    assert all(int(metrics[f"{name}/skipped_in_a_row"]) == 1 for name in METHODS)


def test_rows_without_targets_give_no_gradient_and_no_failure(both, params, batches):
    batch = Batch(*(array.copy() for array in batches[0]))
    for array in batch:
        array[:ROWS] = 0  # x has padding only
    start = _state(both)
    before = _numpy(start.adapters)
    state, metrics = both.train_step(start, params, both.put_train_batch(batch))
    assert float(metrics["x/loss"]) == float(metrics["x/grad_norm"]) == 0
    assert float(metrics["x/target_tokens"]) == int(metrics["x/skipped_total"]) == 0
    # Only weight decay, which the router's leaves do not have.
    decayed = before["x"]["layers"]["self_attn"]["q_proj"]["lora_A"] * (1 - 1e-2 * 0.01)
    ours = state.adapters["x"]["layers"]["self_attn"]["q_proj"]["lora_A"]
    np.testing.assert_allclose(ours, decayed, **ROUNDING)


@pytest.fixture(scope="module")
def gradients(params, batches):
    """Gradients of each adapter on the first batch, in one, two and four micro-batches."""
    result = {}
    for micro_batches in (1, 2, 4):
        program = _program(METHODS, training={"micro_batches": micro_batches})
        state = _state(program)
        before = _numpy(state.adapters)
        batch = program.put_train_batch(batches[0])
        assert batch.tokens.shape == (micro_batches, 2 * ROWS // micro_batches, 16)
        state, metrics = program.train_step(state, params, batch)
        # SGD with learning rate 1 subtracts the gradient.
        lost = jax.tree.map(lambda old, new: old - new, before, _numpy(state.adapters))
        result[micro_batches] = lost, _numpy(metrics)
    return result


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_do_not_change_gradients(micro_batches, gradients, batches):
    # With a separate mean for each micro-batch, rows with few targets would weigh more.
    per_row = batches[0].loss_mask[:, 1:].sum(axis=-1)
    assert per_row.min() == 1 and per_row.max() > 5
    (whole, metrics), (cut, cut_metrics) = gradients[1], gradients[micro_batches]
    _assert_equal(cut, whole, **GRADIENT_ROUNDING)
    for name in METHODS:
        for metric in ("loss", "grad_norm", "target_tokens"):
            ours, theirs = cut_metrics[f"{name}/{metric}"], metrics[f"{name}/{metric}"]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_micro_batches_have_rows_of_every_adapter():
    program = _program(METHODS, training={"micro_batches": 2})
    rows = np.arange(2 * ROWS)[:, None] * np.ones((1, 16), int)
    real = np.ones_like(rows)
    batch = program.put_train_batch(Batch(rows, real.astype(bool), *[real] * 5))
    # Rows 0 to 3 belong to x, 4 to 7 to y.
    np.testing.assert_array_equal(batch.tokens[:, :, 0], [[0, 1, 4, 5], [2, 3, 6, 7]])


@pytest.mark.parametrize(
    "segment_ids", [[[0, 1, 1, 1]], [[1, 1, 2, 2]], [[1, 0, 1, 1]]], ids=["left", "packed", "gap"]
)
def test_invalid_rows_raise(segment_ids):
    program = _program({"y": LORA}, rows=1)
    ids = np.array(segment_ids, np.int32)
    batch = Batch(ids, ids > 0, *[ids] * 5)
    for put in (program.put_train_batch, program.put_eval_batch):
        with pytest.raises(ValueError, match="single sequence, padded on the right only"):
            put(batch)


@pytest.fixture(scope="module")
def noisy():
    """Program with dropout, jitter and all router losses."""
    losses = {name: {"coefficient": 0.1} for name in ("load_balance", "importance_cv", "router_z")}
    router = {"name": "top_k", "jitter_noise": 0.2}
    method = {**MIXLORA, "dropout": 0.2, "router": router, "losses": losses}
    return _program({"x": method}, rows=2 * ROWS)


def _step(program, params, batch, step=0):
    state = _state(program)
    state = state.replace(step=jax.device_put(jnp.int32(step), program.state_shardings.step))
    state, metrics = program.train_step(state, params, program.put_train_batch(batch))
    return _numpy((state.adapters, metrics))


def test_tokens_in_padding_change_nothing(noisy, params, batches):
    batch = batches[0]
    padding = batch.segment_ids == 0
    assert padding.mean() > 0.1
    junk = np.random.default_rng(9).integers(0, 96, batch.tokens.shape).astype(np.int32)
    other = batch._replace(tokens=np.where(padding, junk, batch.tokens))
    ours, theirs = (_step(noisy, params, b) for b in (batch, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_noise_depends_on_the_step_only(noisy, params, batches):
    first, again = (_step(noisy, params, batches[0], step=3) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    _, other = _step(noisy, params, batches[0], step=4)
    assert abs(first[1]["x/loss"] - other["x/loss"]) > 1e-3
    assert abs(first[1]["x/router_z"] - other["x/router_z"]) > 1e-5


def test_evaluation_is_without_noise(noisy, both, params, batches):
    # The same weights under a method without noise give the same loss.
    adapters = tiny_program.random_adapters(noisy)
    results = []
    for program in (noisy, both):
        batch = program.put_eval_batch(batches[0])
        results.append(program.eval_step("x", adapters, params, batch))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


@pytest.fixture(scope="module")
def half():
    """Half precision, with a loss scale for each adapter."""
    return _program(METHODS, compute={"dtype": "float16"}, training={"initial_loss_scale": 2.0**24})


def test_float16_lowers_its_loss_scale_and_then_trains(half, params, batches, gradients):
    state, batch = _state(half), half.put_train_batch(batches[0])
    scale, losses = dict.fromkeys(METHODS, 2.0**24), []
    first_gradient = {}
    for _ in range(30):
        before = _numpy(state.adapters)
        state, metrics = half.train_step(state, params, batch)
        for name in METHODS:
            skipped = int(metrics[f"{name}/skipped_in_a_row"]) > 0
            scale[name] /= 2.0 if skipped else 1.0
            assert float(metrics[f"{name}/loss_scale"]) == scale[name]
            if not skipped and name not in first_gradient:
                after = _numpy(state.adapters[name])
                first_gradient[name] = jax.tree.map(np.subtract, before[name], after)
        losses.append([float(metrics[f"{name}/loss"]) for name in METHODS])
    # 2^24 overflows float16; the lowered scale gives finite and correct gradients.
    assert all(1.0 < value < 2.0**24 for value in scale.values())
    exact, _ = gradients[1]
    for name in METHODS:
        ours, theirs = (
            np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree[name])])
            for tree in (first_gradient, exact)
        )
        # Rounding of 2^-11 through two layers, forward and backward.
        assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs)
    assert all(last < 0.7 * first for first, last in zip(losses[0], losses[-1], strict=True))


def test_an_overflow_affects_its_adapter_only(half, params, batches):
    broken = _with_leaf(tiny_program.random_adapters(half), "x", np.nan)
    state = _state(half, broken)
    low = {name: initial_loss_scale(1024.0) for name in METHODS}
    state = jax.device_put(_numpy(state.replace(loss_scale=low)), half.state_shardings)
    state, _ = half.train_step(state, params, half.put_train_batch(batches[0]))
    assert float(state.loss_scale["x"].scale) == 512.0
    assert int(state.loss_scale["x"].finite_steps) == 0
    assert float(state.loss_scale["y"].scale) == 1024.0
    assert int(state.loss_scale["y"].finite_steps) == 1
