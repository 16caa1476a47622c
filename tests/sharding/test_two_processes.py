"""Training in two processes of four devices each, against one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import tiny_program
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

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script, output = Path(__file__).with_name("two_processes.py"), tmp_path / "gradients.npz"
    paths = [str(script.parent), str(script.parents[1]), str(script.parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), port, str(i), str(output)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]

    theirs = json.loads(outputs[0][0].splitlines()[-1])
    assert theirs.keys() == metrics.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(value, metrics[name], **ROUNDING, err_msg=name)
    with np.load(output) as gradients:
        for ours, own in zip(expected, gradients.values(), strict=True):
            np.testing.assert_allclose(own, ours, **GRADIENT_ROUNDING)
