"""Training in two processes of four devices each, against one device."""

import json
from pathlib import Path

import jax
import numpy as np
import tiny_program
from process_pair import run_pair
from tolerances import GRADIENT_ROUNDING, ROUNDING

METHOD = {**tiny_program.MIXLORA, "dropout": 0.1}
MODEL = tiny_program.model_config(num_layers=2)
ROWS = 16


def test_loss_and_gradients_equal_one_device(tmp_path):
    program = tiny_program.program({"default": METHOD}, rows=ROWS, config=MODEL)
    params = tiny_program.random_params(program)
    state = program.init_state(params).replace(adapters=tiny_program.random_adapters(program))
    before = jax.tree.map(np.asarray, state.adapters)
    batch = program.put_train_batch(tiny_program.random_batch(ROWS))
    state, metrics = program.train_step(state, params, batch)
    expected = jax.tree.leaves(jax.tree.map(lambda a, b: a - np.asarray(b), before, state.adapters))

    output = tmp_path / "gradients.npz"
    outputs = run_pair(Path(__file__).with_name("two_processes.py"), output)

    theirs = json.loads(outputs[0].splitlines()[-1])
    assert theirs.keys() == metrics.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(value, metrics[name], **ROUNDING, err_msg=name)
    with np.load(output) as gradients:
        for ours, own in zip(expected, gradients.values(), strict=True):
            np.testing.assert_allclose(own, ours, **GRADIENT_ROUNDING)
