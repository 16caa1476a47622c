"""A run of preference training that is killed, with several adapters side by side."""

import shutil
import signal
import time

import numpy as np
import pytest
from preference_run import write_inputs, write_side_by_side
from tiny_run import Run, final_adapter, metric_lines

from moe_jax.checkpoints.store import latest_step

ADAPTERS = ("kto_cached", "kto_step", "base_step", "start_cached", "start_step")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Configuration of adapters with all kinds of references, of which two are a former run's."""
    config = write_inputs(tmp_path_factory.mktemp("inputs"))
    run = Run(config, config.parent / "former", overrides={"training__steps": 2})
    assert run.join(600) == 0, run.log.read_text()
    shutil.copytree(config.parent / "former" / "adapters" / "default", config.parent / "start")
    return write_side_by_side(config.parent)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run = Run(inputs, workdir)
    assert run.join(600) == 0, run.log.read_text()
    return workdir


def test_a_killed_run_ends_with_the_same_bits(inputs, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    run = Run(inputs, workdir)
    while latest_step(workdir / "checkpoints") is None:
        assert run.process.is_alive(), run.log.read_text()
        time.sleep(0.005)
    run.process.kill()
    assert run.join(600) == -signal.SIGKILL
    step = latest_step(workdir / "checkpoints")
    run = Run(inputs, workdir, name="resumed")
    assert run.join(600) == 0, run.log.read_text()
    assert step in range(1, 40) and f"resumed at step {step}\n" in run.log.read_text()
    start = final_adapter(inputs.parent, "start", folder="")
    for name in ADAPTERS:
        expected, found = final_adapter(undisturbed, name), final_adapter(workdir, name)
        assert expected.keys() == found.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf, err_msg=path, strict=True)
    assert any(
        np.any(leaf != start[path]) for path, leaf in final_adapter(workdir, "start_step").items()
    )
    assert metric_lines(workdir) == metric_lines(undisturbed)
    kl = [line["kto_step/kl"] for line in metric_lines(workdir) if "kto_step/kl" in line]
    assert kl[-1] > 0.01  # the loss compares with it
