"""Steps of preference adapters: references, router losses, meshes, cost and memory."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import FLOAT32_LOGITS, GRADIENT_OF_LARGEST, ROUNDING

from benchmarks.compiled_flops import compiled_flops
from moe_jax.config import preference as losses
from moe_jax.training.step.micro_batches import join_rows
from moe_jax.training.step.needed_flops import needed_flops
from moe_jax.training.step.preference_loss import AnswerLogProbs, rewards_and_losses

TARGETS = ("q_proj", "up_proj")
LORA = {**tiny_program.LORA, "target_modules": TARGETS}
MIXLORA = {**tiny_program.MIXLORA, "target_modules": TARGETS}
WITHOUT = {**MIXLORA, "losses": {"load_balance": {"coefficient": 0.0}}}
BALANCED = {**MIXLORA, "losses": {"load_balance": {"coefficient": 0.5}}}
ROWS = 8

STEP = {"reference_log_probs": "step"}
DPO = {"name": "dpo", "beta": 0.4}
METHODS = {
    "from_start": LORA,
    "cached": LORA,
    "kto": LORA,
    "dpo_balanced": BALANCED,
    "dpo_without": WITHOUT,
    "sft_balanced": BALANCED,
    "sft_without": WITHOUT,
}
PREFERENCES = {
    "from_start": {**DPO, **STEP, "reference": "start"},
    "cached": DPO,
    "kto": {"name": "kto", **STEP},
    "dpo_balanced": {**DPO, **STEP},
    "dpo_without": {**DPO, **STEP},
}


def make_program(methods=METHODS, preferences=PREFERENCES, **fields):
    return tiny_program.program(methods, rows=ROWS, preferences=preferences, **fields)


@pytest.fixture(scope="module")
def program():
    return make_program()


@pytest.fixture(scope="module")
def trees(program):
    """Params, adapters, and the start of `from_start`; equal for equal methods."""
    adapters = jax.tree.map(np.asarray, tiny_program.random_adapters(program))
    start = jax.tree.map(np.asarray, tiny_program.random_adapters(program, seed=5))["from_start"]
    adapters["cached"] = adapters["from_start"]
    for name in ("dpo_without", "sft_balanced", "sft_without"):
        adapters[name] = adapters["dpo_balanced"]
    params = jax.tree.map(np.asarray, tiny_program.random_params(program))
    return params, adapters, start


@pytest.fixture(scope="module")
def batches(program, trees):
    """One batch for all; `cached` has the log-probabilities of the start with its rows."""
    params, _, start = trees
    batch = tiny_program.random_batch(ROWS, seed=3)
    scored, _ = program.answer_step(
        program.config.methods["from_start"], start, params, program.put_eval_batch(batch)
    )
    found = {name: jax.tree.map(np.copy, batch) for name in METHODS}
    last = batch.segment_ids.sum(axis=1) - 1
    found["cached"].reference_log_probs[np.arange(ROWS), last] = scored
    found["kto"].labels[np.arange(0, ROWS, 2), last[::2]] = [1, 0, 1, 1]
    return found


def one_step(program, trees, batches):
    params, adapters, start = trees
    params = jax.device_put(params, program.param_shardings)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    state = state.replace(adapters=adapters, references={"from_start": start})
    state = jax.device_put(state, program.state_shardings)
    batch = join_rows([batches[rows.name] for rows in program.adapter_rows])
    new, metrics = program.train_step(state, params, program.put_train_batch(batch))
    jax.tree.map(np.testing.assert_array_equal, new.references["from_start"], start)
    gradients = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), adapters, new.adapters)
    return gradients, {name: np.asarray(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def step(program, trees, batches):
    return one_step(program, trees, batches)


def assert_close(ours, theirs):
    def close(mine, other):
        atol = GRADIENT_OF_LARGEST * np.abs(other).max()
        np.testing.assert_allclose(mine, other, rtol=0, atol=atol)

    jax.tree.map(close, ours, theirs)


def test_a_start_in_the_step_equals_its_scores_computed_before(step):
    gradients, metrics = step
    assert_close(gradients["from_start"], gradients["cached"])
    for name in ("loss", "reward_chosen", "reward_margin", "reference_kl"):
        found, expected = (metrics[f"{adapter}/{name}"] for adapter in ("from_start", "cached"))
        np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_LOGITS)
    assert abs(metrics["cached/reference_kl"]) > 0.1


def test_router_losses_train_along(step):
    """They depend on the tokens alone, so that they add the same gradient to any loss."""
    gradients, metrics = step
    added = {
        kind: jax.tree.map(np.subtract, gradients[f"{kind}_balanced"], gradients[f"{kind}_without"])
        for kind in ("dpo", "sft")
    }
    routers = {
        kind: tree["layers"]["mlp"]["moe"]["router"]["kernel"] for kind, tree in added.items()
    }
    assert np.abs(routers["sft"]).max() > 1e-3
    np.testing.assert_allclose(routers["dpo"], routers["sft"], rtol=0, atol=FLOAT32_LOGITS)
    for name in ("load_balance", "mean_entropy"):
        expected = metrics[f"sft_balanced/{name}"]
        np.testing.assert_allclose(metrics[f"dpo_balanced/{name}"], expected, **ROUNDING)


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [
        ({"data": 2, "fsdp": 1, "tensor": 2}, 2),
        ({"data": 1, "fsdp": 2, "tensor": 1}, 2),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
    ],
)
def test_a_mesh_and_micro_batches_do_not_change_the_step(trees, batches, step, mesh, micro_batches):
    program = make_program(
        mesh=mesh,
        devices=math.prod(mesh.values()),
        training={"micro_batches": micro_batches},
    )
    gradients, metrics = one_step(program, trees, batches)
    for name in ("from_start", "cached", "kto", "dpo_without"):  # the balance is of micro-batches
        assert_close(gradients[name], step[0][name])
        kl = "kl" if name == "kto" else "reference_kl"
        for metric in ("loss", "reward_margin", "reward_accuracy", kl):
            found, expected = metrics[f"{name}/{metric}"], step[1][f"{name}/{metric}"]
            np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_LOGITS)


def test_margins_are_0_before_the_first_step():
    program = make_program({"a": LORA}, {"a": {**DPO, **STEP}})
    params = tiny_program.random_params(program)
    batch = program.put_train_batch(tiny_program.random_batch(ROWS))
    state = program.init_state(params)
    state, metrics = program.train_step(state, params, batch)
    for name in ("reward_chosen", "reward_rejected", "reward_margin", "reference_kl"):
        assert metrics[f"a/{name}"] == 0.0, name
    np.testing.assert_allclose(metrics["a/loss"], math.log(2), **ROUNDING)
    _, metrics = program.train_step(state, params, batch)
    assert metrics["a/reward_margin"] != 0.0


# A base much larger than the adapters and the activations.
WIDE = tiny_program.model_config(
    vocab_size=64,
    hidden_size=512,
    intermediate_size=2048,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
)


@pytest.fixture(scope="module")
def wide():
    """Program and its compiled step: SFT, and DPO with scores before and in the step."""
    method = {**tiny_program.LORA, "rank": 1}
    kinds = {
        "sft": {},
        "cached": {"a": DPO},
        "base": {"a": {**DPO, **STEP}},
        "start": {"a": {**DPO, **STEP, "reference": "start"}},
    }
    programs = {
        kind: tiny_program.program({"a": method}, rows=2, config=WIDE, preferences=preferences)
        for kind, preferences in kinds.items()
    }
    return {kind: (made, made.compiled_train_step(16)) for kind, made in programs.items()}


def in_bytes(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_no_reference_is_a_second_copy_of_the_base(wide):
    base = in_bytes(wide["sft"][0].abstract_params)
    sft = wide["sft"][1].memory_analysis().temp_size_in_bytes
    for kind, (program, compiled) in wide.items():
        memory, state = compiled.memory_analysis(), in_bytes(program.abstract_state)
        tokens = 2 * 16
        # Id, segment, position and loss mask of each token, and the scores where they are given.
        batch = tokens * (13 + 4 * (kind == "cached"))
        assert abs(memory.argument_size_in_bytes - (base + state + batch)) <= 8
        assert memory.temp_size_in_bytes < base / 2
        assert memory.temp_size_in_bytes <= 1.01 * sft
    adapter = in_bytes(wide["start"][0].abstract_state.adapters)
    states = {kind: in_bytes(program.abstract_state) for kind, (program, _) in wide.items()}
    assert states["start"] - states["base"] == adapter < base / 50


def test_cost_of_a_step(wide):
    """A step with given scores costs what SFT does, and one that scores a forward more."""
    flops = {kind: compiled_flops(compiled).total for kind, (_, compiled) in wide.items()}
    assert flops["cached"] == pytest.approx(flops["sft"], rel=0.01)
    # 4 FLOPs a frozen weight and token, and 2 for the reference.
    assert flops["base"] / flops["sft"] == pytest.approx(1.5, rel=0.02)
    needed = {
        kind: needed_flops(
            WIDE,
            program.config.methods,
            program.abstract_state.adapters,
            program.config.preferences,
        ).of_full_rows({"a": 2}, 16)
        for kind, (program, _) in wide.items()
    }
    assert needed["cached"] == needed["sft"]
    for kind in ("base", "start"):
        expected = flops[kind] / flops["sft"]
        assert needed[kind] / needed["sft"] == pytest.approx(expected, rel=0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticConfig(losses.ReferencedPreferenceConfig):
    """A loss of single answers without an estimate of KL, as a user may add it."""

    schema: ClassVar[losses.PreferenceSchema] = "feedback"


@rewards_and_losses.register
def _(preference: LogisticConfig, answers: AnswerLogProbs) -> tuple[jax.Array, jax.Array]:
    rewards = preference.beta * answers.log_ratios
    return rewards, jax.nn.softplus(jnp.where(answers.labels > 0, -1.0, 1.0) * rewards[:, 0])


def test_a_loss_of_single_answers_from_outside_the_package(trees, batches, monkeypatch):
    monkeypatch.setitem(losses.PREFERENCES._members, "logistic", LogisticConfig)
    preferences = {"logistic": {"name": "logistic", "beta": 0.3, **STEP}}
    program = make_program({"logistic": LORA}, preferences, training={"micro_batches": 2})
    params, adapters, _ = trees
    state = program.init_state(params).replace(adapters={"logistic": adapters["kto"]})
    batch = batches["kto"]
    _, metrics = program.train_step(state, params, program.put_train_batch(batch))
    rows = program.put_eval_batch(batch)
    method = program.config.methods["logistic"]
    trained, _ = program.answer_step(method, adapters["kto"], params, rows)
    reference, _ = program.answer_step(None, None, params, rows)
    rewards = 0.3 * (np.asarray(trained) - np.asarray(reference))[::2]
    signs = np.array([1, -1, 1, 1])
    expected = np.log1p(np.exp(-signs * rewards)).mean()
    tolerance = {"rtol": 0, "atol": FLOAT32_LOGITS}
    np.testing.assert_allclose(metrics["logistic/loss"], expected, **tolerance)
    chosen = rewards[signs > 0].mean()
    np.testing.assert_allclose(metrics["logistic/reward_chosen"], chosen, **tolerance)
    accuracy = (signs * rewards > 0).mean()
    assert metrics["logistic/reward_accuracy"] == accuracy
