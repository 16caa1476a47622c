"""Two adapters on a mesh: equal to one device, and no rows move between devices."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny_program
from tolerances import GRADIENT_ROUNDING, ROUNDING

from moe_jax.adapters.rows import divide_rows

TARGETS = ("q_proj", "up_proj", "down_proj")
METHODS = {
    "x": {**tiny_program.MIXLORA, "target_modules": TARGETS, "dropout": 0.1},
    "y": {**tiny_program.LORA, "target_modules": TARGETS, "dropout": 0.1},
}
MODEL = tiny_program.model_config(num_layers=2)
ROWS, LENGTH = 8, 20  # no weight has this width, so that shapes identify rows
MESH = {"data": 2, "fsdp": 4}


def _program(methods=METHODS, mesh=None):
    return tiny_program.program(methods, rows=ROWS, mesh=mesh, config=MODEL)


@pytest.fixture(scope="module")
def on_mesh():
    return _program(mesh=MESH)


def _step(program):
    params = tiny_program.random_params(program)
    adapters = tiny_program.random_adapters(program)
    before = jax.tree.map(np.asarray, adapters)
    state = program.init_state(params).replace(adapters=adapters)
    batch = program.put_train_batch(tiny_program.random_batch(2 * ROWS, LENGTH))
    state, metrics = program.train_step(state, params, batch)
    # Plain SGD with learning rate 1: the decrease of a leaf is its gradient.
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.adapters)
    return gradients, jax.tree.map(np.asarray, metrics)


def test_losses_and_gradients_equal_one_device(on_mesh):
    (ours, metrics), (expected, expected_metrics) = _step(on_mesh), _step(_program())
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, **ROUNDING, err_msg=name)
    jax.tree.map(
        lambda sharded, one: np.testing.assert_allclose(sharded, one, **GRADIENT_ROUNDING),
        ours,
        expected,
    )
    assert min(float(metrics[f"{name}/grad_norm"]) for name in METHODS) > 0.1


def _exchanged(compiled):
    """Collectives of arrays with a token axis: operation and shape of the result."""
    collectives = re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
        r"(?:-start)?\(",
        compiled.as_text(),
    )
    assert collectives
    return {
        (operation, shape)
        for result, operation in collectives
        for shape in re.findall(r"\w+\[([\d,]+)\]", result)
        if str(LENGTH) in shape.split(",")
    }


def test_taking_an_adapters_rows_moves_nothing(on_mesh):
    alone = _exchanged(_program({"x": METHODS["x"]}, MESH).compiled_train_step(LENGTH))
    assert _exchanged(on_mesh.compiled_train_step(LENGTH)) <= alone
    # If the first half of the batch belonged to one adapter and the second to the other, devices
    # would have rows of one adapter only, and each update of rows would move activations.
    methods = {rows.name: rows.method for rows in on_mesh.adapter_rows}
    halves = divide_rows(methods, dict.fromkeys(methods, ROWS), shards=1)
    moving = dataclasses.replace(on_mesh, adapter_rows=halves).lower_train_step(LENGTH).compile()
    hidden_states = f",{LENGTH},{MODEL.hidden_size}"
    assert any(shape.endswith(hidden_states) for _, shape in _exchanged(moving) - alone)
