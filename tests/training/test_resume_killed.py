"""Runs that are killed, stopped or moved end with the adapters of an uninterrupted run."""

import random
import shutil
import signal
import time

import numpy as np
import pytest
from tiny_run import Run, final_adapter, metric_lines, write_inputs
from tolerances import GRADIENT_ROUNDING

from moe_jax.checkpoints.store import latest_step

# Saves every fourth step, so that many kills hit a save. One bucket: one compilation.
OVERRIDES = {
    "training__steps": 300,
    "training__log_every": 5,
    "training__eval_every": 50,
    "checkpoints__every": 4,
    "adapters__default__data__buckets": "()",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run = Run(inputs, workdir, overrides=OVERRIDES)
    assert run.join() == 0, run.log.read_text()
    return workdir


def assert_same_outcome(workdir, other):
    for folder in ("adapters", "best"):
        expected = final_adapter(other, folder=folder)
        actual = final_adapter(workdir, folder=folder)
        assert expected.keys() == actual.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(actual[path], leaf, err_msg=path, strict=True)
        for name in ("training.json", "loss.png", "experts.png"):
            former, resumed = (root / folder / "default" / name for root in (other, workdir))
            assert resumed.read_bytes() == former.read_bytes(), name
    assert metric_lines(workdir) == metric_lines(other)


def test_ten_kills_at_random_times_change_nothing(inputs, uninterrupted, tmp_path):
    moments, workdir = random.Random(0), tmp_path / "run"
    resumed_at = []
    for kill in range(10):
        run = Run(inputs, workdir, overrides=OVERRIDES)
        run.wait_until("  grad ", times=moments.randint(2, 4))
        time.sleep(moments.uniform(0.0, 0.1))
        assert run.process.is_alive(), f"finished before kill {kill}: {run.log.read_text()}"
        run.process.kill()
        assert run.join() == -signal.SIGKILL
        resumed_at.append(latest_step(workdir / "checkpoints") or 0)
    run = Run(inputs, workdir, overrides=OVERRIDES)
    assert run.join() == 0, run.log.read_text()
    assert resumed_at == sorted(resumed_at)
    assert len(set(resumed_at)) > 5, resumed_at
    assert_same_outcome(workdir, uninterrupted)


def test_sigterm_saves_and_the_next_run_resumes(inputs, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    run = Run(inputs, workdir, overrides={**OVERRIDES, "checkpoints__every": 1000})
    run.wait_until("step  15")
    run.process.terminate()
    assert run.join() == 128 + signal.SIGTERM
    (step,) = [p.name for p in (workdir / "checkpoints").iterdir()]
    assert 15 <= int(step) < 300
    assert f"saved at step {step}" in run.log.read_text()
    assert not (workdir / "adapters").exists()
    run = Run(inputs, workdir, overrides=OVERRIDES)
    assert run.join() == 0, run.log.read_text()
    assert f"resumed at step {step}" in run.log.read_text()
    assert_same_outcome(workdir, uninterrupted)


def test_a_resumed_run_may_use_another_mesh(inputs, tmp_path):
    # SGD keeps differences of rounding small; Adam divides by them.
    short = {
        **OVERRIDES,
        "training__steps": 8,
        "adapters__default__optimizer__name": "sgd",
        "adapters__default__optimizer__learning_rate": 0.1,
    }
    one, moved = tmp_path / "one", tmp_path / "moved"
    run = Run(inputs, one, overrides=short)
    assert run.join() == 0, run.log.read_text()
    moved.mkdir()
    shutil.copy(one / "config.json", moved)
    shutil.copytree(one / "checkpoints" / "4", moved / "checkpoints" / "4")

    run = Run(inputs, moved, devices=4, overrides={**short, "mesh__fsdp": 2})
    assert run.join() == 0, run.log.read_text()
    log = run.log.read_text()
    assert "resumed at step 4" in log
    assert "4 x cpu (data 2, fsdp 2, tensor 1)" in log
    expected, actual = final_adapter(one), final_adapter(moved)
    changed = 0
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, **GRADIENT_ROUNDING, err_msg=path)
        changed += int(np.any(actual[path] != leaf))
    assert changed, "the other mesh was not used"
