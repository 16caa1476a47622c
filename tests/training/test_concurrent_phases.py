"""Phases of a run: when an adapter ends, the others train on without it."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_program
from one_device import one_device
from tiny_run import Run, final_adapter, metric_lines, read_config, write_inputs
from tolerances import GRADIENT_ROUNDING

from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.errors import ConfigError
from moe_jax.training.run.inputs import phases_after, phases_of
from moe_jax.training.run.loop import train
from moe_jax.training.step import program as program_module
from moe_jax.training.step import step
from moe_jax.training.step.state import restrict_state

MODEL = tiny_program.model_config(
    num_layers=1, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=2
)
METHODS = {"a": tiny_program.LORA, "b": tiny_program.MIXLORA}
ADAMW = {"learning_rate": 1e-2}


def test_phases_by_hand():
    phases = phases_of({"a": 40, "b": 60, "c": 40, "d": 90})
    assert phases == (
        (0, 40, ("a", "b", "c", "d"), ("a", "c")),
        (40, 60, ("b", "d"), ("b",)),
        (60, 90, ("d",), ("d",)),
    )
    # The state after step 40 still has the adapters that end with it.
    stops = {step: phases_after(phases, step)[0].stop for step in (0, 1, 40, 41, 60, 61, 90)}
    assert stops == {0: 40, 1: 40, 40: 40, 41: 60, 60: 60, 61: 90, 90: 90}
    assert phases_after(phases, 41) == phases[1:]
    assert phases_of({"a": 5}) == ((0, 5, ("a",), ("a",)),)


@pytest.fixture
def both():
    return tiny_program.program(METHODS, rows=2, optimizer=ADAMW, config=MODEL)


def test_the_state_is_carried_over_by_path(both):
    """Leaves of the smaller state come from the larger one, whose other leaves are freed."""
    state = both.init_state(tiny_program.random_params(both))
    rng = np.random.default_rng(0)
    numbers = jax.tree.map(
        lambda leaf: (10 * rng.random(leaf.shape)).astype(leaf.dtype), both.abstract_state
    )
    state = jax.device_put(numbers, both.state_shardings)
    before = {path: np.array(leaf) for path, leaf in named_leaves(state).items()}
    leaves = named_leaves(state)
    narrow = both.narrowed(["b"])

    carried = restrict_state(state, narrow.abstract_state)

    assert jax.tree.structure(carried) == jax.tree.structure(narrow.abstract_state)
    after = named_leaves(carried)
    assert {path for path in before if "/a/" not in path and "adapter a" not in path} == set(after)
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[path], strict=True, err_msg=path)
        assert leaf.sharding == named_leaves(narrow.state_shardings)[path]
    freed = [path for path, leaf in leaves.items() if leaf.is_deleted()]
    assert sorted(freed) == sorted(set(before) - set(after))
    # Moments, counters and weights of 'a', but no leaf of the base.
    assert {path.split("/")[0] for path in freed} == {"adapters", "opt_state"}


def test_a_missing_leaf_of_the_state_raises(both):
    narrow = both.narrowed(["b"])
    state = narrow.init_state(tiny_program.random_params(narrow))
    with pytest.raises(ValueError, match="the state has no adapters/a/"):
        restrict_state(state, both.abstract_state)


def test_adapters_of_equal_methods_are_evaluated_by_one_compilation(monkeypatch):
    methods = {"a": tiny_program.LORA, "b": tiny_program.MIXLORA, "c": dict(tiny_program.LORA)}
    program = tiny_program.program(methods, rows=2, config=MODEL)
    params, adapters = tiny_program.random_params(program), tiny_program.random_adapters(program)
    traced, eval_step = [], step.eval_step

    def counted(model, *arguments):
        traced.append([rows.method for rows in model.adapter_rows])
        return eval_step(model, *arguments)

    monkeypatch.setattr(step, "eval_step", counted)
    batch = program.put_eval_batch(tiny_program.random_batch(2))
    losses = {name: program.eval_step(name, adapters, params, batch)[0] for name in methods}
    assert traced == [[program.config.adapters[name].method] for name in ("a", "b")]
    # Each has different weights all the same, also after adapters have ended.
    assert losses["a"] != losses["c"]
    swapped = {**adapters, "a": adapters["c"]}
    assert program.eval_step("a", swapped, params, batch)[0] == losses["c"]
    assert program.narrowed(["c"]).eval_step("c", adapters, params, batch)[0] == losses["c"]
    assert len(traced) == 2


def test_a_narrowed_program_keeps_its_schedules(both):
    steps = {"a": 4, "b": 8}
    program = program_module.build_program(both.config, MODEL, steps, devices=jax.devices()[:1])
    narrow = program.narrowed(["b"])
    for done in (0, 3, 4):
        # Linear from the peak of 0.01 to zero at the last step of each adapter.
        expected = {name: 1e-2 * (1 - done / count) for name, count in steps.items()}
        assert program.learning_rates(done) == pytest.approx(expected, rel=1e-6)
        assert narrow.learning_rates(done) == pytest.approx({"b": expected["b"]}, rel=1e-6)


def test_initialization_depends_on_the_seed_of_the_adapter(both):
    params = tiny_program.random_params(both)

    def fresh(**seeds):
        adapters = {
            name: dataclasses.replace(
                adapter, seed=seeds.get(name), method=both.config.adapters["a"].method
            )
            for name, adapter in both.config.adapters.items()
        }
        config = dataclasses.replace(both.config, adapters=adapters)
        program = program_module.build_program(config, MODEL, 1, devices=jax.devices()[:1])
        state = program.init_state(params)
        return {name: np.asarray(jax.tree.leaves(tree)[0]) for name, tree in state.adapters.items()}

    same, different = fresh(), fresh(b=7)
    assert (same["a"] == same["b"]).all()
    assert (different["a"] == same["a"]).all()
    assert (different["b"] != same["b"]).any()


TWO = """

def get_config():
    adapters = dict(
        short=adapter("train", name="lora"),
        long=adapter("other", name="mixlora", num_experts=4, router=dict(name="top_k", top_k=2)),
    )
    for each in adapters.values():
        each["method"] |= dict(dropout=0.0, target_modules=("q_proj", "up_proj"))
        each["data"] |= dict(validation={}, sort_window=6)
        # Adam would divide by, and so amplify, rounding errors.
        each["optimizer"] = dict(name="sgd", learning_rate=0.1)
    adapters["short"]["steps"] = 2
    adapters["long"] |= dict(batch_size=4, steps=4)
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32"),
        adapters=adapters,
        training=dict(seed=3),
    )
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    config = write_inputs(tmp_path_factory.mktemp("inputs"))
    config.write_text(config.read_text() + TWO)
    return config


@pytest.fixture(scope="module")
def on_one_device(inputs, tmp_path_factory):
    """Work directory and printed lines of a run, and the training steps that it lowered."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    printed, lowered = [], []
    lower = program_module.Program.lower_train_step

    def counted(self, row_length):
        lowered.append((tuple(segment.name for segment in self.adapter_rows), row_length))
        return lower(self, row_length)

    with one_device() as patch:
        patch.setattr(program_module.Program, "lower_train_step", counted)
        train(read_config(inputs), workdir, printed.append)
    return workdir, printed, lowered


def test_one_compilation_for_each_program_and_row_length(on_one_device):
    _, printed, lowered = on_one_device
    assert len(lowered) == len(set(lowered))
    assert {names for names, _ in lowered} == {("short", "long"), ("long",)}
    assert {length for _, length in lowered} == {16, 24}
    finished = [line.split(";")[0] for line in printed if "finished" in line]
    assert finished == [
        "adapter 'short' finished at step 2",
        "adapter 'long' finished at step 4",
    ]


def test_the_table_has_a_row_for_each_phase(on_one_device):
    _, printed, _ = on_one_device
    table = [line.split() for line in printed]
    (short,) = [line for line in printed if line.startswith("adapter      'short'")]
    assert short.endswith("2 steps of 8 rows")
    at = next(i for i, words in enumerate(table) if words[0] == "steps")
    assert printed[at].split(maxsplit=1)[1] == (
        "1 to 2 of 12 rows, up to 288 tokens each: 2 adapters"
    )
    assert printed[at + 1].strip() == "3 to 4 of 4 rows, up to 96 tokens each: 1 adapter"


def test_an_adapter_whose_last_gradient_is_not_finite_ends(on_one_device, inputs, tmp_path):
    """The first step moves its weights so far that the second, its last, overflows."""
    workdir = tmp_path / "run"
    short = "adapters__short"
    far = {f"{short}__method__alpha": 1e13, f"{short}__optimizer__learning_rate": 1e30}
    with one_device():
        config = read_config(inputs, **far)
        assert train(config, workdir, lambda _: None).step == 4
    (end,) = [line for line in metric_lines(workdir) if "short/skipped_total" in line]
    assert (end["step"], end["short/skipped_total"], end["short/skipped_in_a_row"]) == (2, 1, 1)
    assert all(np.isfinite(leaf).all() for leaf in final_adapter(workdir, "short").values())
    for path, leaf in final_adapter(on_one_device[0], "long").items():
        actual = final_adapter(workdir, "long")[path]
        np.testing.assert_allclose(actual, leaf, **GRADIENT_ROUNDING, err_msg=path)


def test_a_mesh_does_not_change_the_adapters(on_one_device, inputs, tmp_path):
    """The state of the remaining adapter stays sharded as before."""
    overrides = {f"adapters__{name}__data__buckets": "()" for name in ("short", "long")}
    run = Run(inputs, tmp_path / "mesh", devices=4, overrides={**overrides, "mesh__fsdp": 2})
    assert run.join() == 0, run.log.read_text()
    assert "4 x cpu (data 2, fsdp 2, tensor 1)" in run.log.read_text()
    for name in ("short", "long"):
        actual = final_adapter(run.workdir, name)
        for path, leaf in final_adapter(on_one_device[0], name).items():
            np.testing.assert_allclose(actual[path], leaf, **GRADIENT_ROUNDING, err_msg=path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"training__max_batch_rows": 11},
            "config.training.max_batch_rows: the adapters take 12 rows of a step, more than 11",
        ),
        ({"training__max_batch_rows": 0}, "config.training.max_batch_rows: must be positive"),
        (
            {"adapters__long__epochs": 1.0},
            "config.adapters.long.steps: give either steps or epochs, or neither for",
        ),
        ({"adapters__long__steps": 0}, "config.adapters.long.steps: must be positive"),
        ({"adapters__long__seed": -1}, "config.adapters.long.seed: must not be negative"),
        ({"adapters__long__steps": None}, "config.training.steps: give either steps or epochs"),
    ],
)
def test_invalid_settings(inputs, overrides, words):
    with pytest.raises(ConfigError) as error:
        read_config(inputs, **overrides)
    assert str(error.value).startswith(words)


def test_the_largest_number_of_rows_is_valid(inputs):
    config = read_config(inputs, training__max_batch_rows=12)
    assert config.training.max_batch_rows == 12
