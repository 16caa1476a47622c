"""A signal while the run measures: what is said, and what a resumed run ends with."""

import os
import signal

import numpy as np
import pytest
from one_device import one_device
from tiny_run import final_adapter, metric_lines, read_config, write_inputs

from moe_jax.training.run import session
from moe_jax.training.run.loop import train

SHORT = {
    "adapters__default__data__buckets": "()",
    "training__steps": 6,
    "training__log_every": 2,
    "training__eval_every": 2,
    "checkpoints__every": 100,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs, workdir, lines=None):
    with one_device():
        say = (lambda line: None) if lines is None else lines.append
        return train(read_config(inputs, **SHORT), workdir, say)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(inputs, workdir)
    return workdir


@pytest.fixture
def signal_validation(monkeypatch):
    """Sends SIGINT in the validation of the given number, from 0."""

    def send(number):
        validate, calls = session.validate, []

        def signalled(*arguments):
            calls.append(arguments)
            if len(calls) == number + 1:
                os.kill(os.getpid(), signal.SIGINT)
            return validate(*arguments)

        monkeypatch.setattr(session, "validate", signalled)

    return send


def test_a_run_stops_after_the_validation_of_its_step(
    inputs, undisturbed, signal_validation, tmp_path, capfd
):
    signal_validation(1)
    workdir = tmp_path / "run"
    result = run(inputs, workdir)
    assert (result.step, result.interrupted_by) == (2, signal.SIGINT)
    said = "SIGINT: stopping after this validation"
    assert said in capfd.readouterr().err.splitlines()
    assert run(inputs, workdir).step == 6
    assert metric_lines(workdir) == metric_lines(undisturbed)
    expected, actual = final_adapter(undisturbed), final_adapter(workdir)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path, strict=True)


def test_a_run_that_has_made_no_step_says_that_nothing_is_saved(
    inputs, signal_validation, tmp_path
):
    signal_validation(0)
    lines = []
    result = run(inputs, tmp_path / "run", lines)
    assert (result.step, result.interrupted_by) == (0, signal.SIGINT)
    assert lines[-1] == "stopped before a step was made; nothing is saved"
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
