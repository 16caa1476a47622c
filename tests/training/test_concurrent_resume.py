"""Exact resumption of a run whose adapters end at different steps."""

import json
import shutil
import signal

import numpy as np
import pytest
from tiny_run import Run, final_adapter, metric_lines, write_inputs

from moe_jax.checkpoints.adapter_files import read_description
from moe_jax.checkpoints.store import latest_step

# With dropout and jitter, which are random in each step. Adapter 'short' ends in the middle of a
# window of metrics. Rows of 'long' are packed, those of 'short' are not.
TWO = """

def get_config():
    router = dict(name="top_k", top_k=2, jitter_noise=0.1)
    adapters = dict(
        short=adapter("train", name="lora"),
        long=adapter("other", name="mixlora", num_experts=4, router=router),
    )
    for each in adapters.values():
        each["data"]["buckets"] = ()
    adapters["short"]["steps"] = 6
    adapters["long"]["batch_size"] = 4
    adapters["long"]["data"] |= dict(packing="first_fit", max_length=32)
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32"),
        adapters=adapters,
        training=dict(steps=9, log_every=4, eval_every=4, seed=3),
        checkpoints=dict(every=1, keep=100),
    )
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    config = write_inputs(tmp_path_factory.mktemp("inputs"))
    config.write_text(config.read_text() + TWO)
    return config


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    run = Run(inputs, tmp_path_factory.mktemp("uninterrupted") / "run")
    assert run.join() == 0, run.log.read_text()
    return run.workdir


def after(uninterrupted, workdir, step):
    """Copy of the run as it was right after the state of `step` was saved."""
    shutil.copytree(uninterrupted, workdir)
    for saved in (workdir / "checkpoints").iterdir():
        if int(saved.name) > step:
            shutil.rmtree(saved)
    shutil.rmtree(workdir / "adapters" / "long")
    if step <= 6:  # the final folder of an adapter is written after the state of its last step
        shutil.rmtree(workdir / "adapters" / "short")
    return workdir


def assert_same_outcome(workdir, other):
    for folder in ("adapters", "best"):
        for name in ("short", "long"):
            expected, actual = (
                final_adapter(other, name, folder),
                final_adapter(workdir, name, folder),
            )
            assert expected.keys() == actual.keys()
            for path, leaf in expected.items():
                np.testing.assert_array_equal(actual[path], leaf, err_msg=path, strict=True)
            files = [file for file in (other / folder / name).iterdir() if file.is_file()]
            assert {"adapter.json", "training.json", "loss.png"} <= {file.name for file in files}
            for file in files:
                resumed = workdir / folder / name / file.name
                assert resumed.read_bytes() == file.read_bytes(), resumed
    assert metric_lines(workdir) == metric_lines(other)


def test_lines_and_states_by_hand(uninterrupted):
    lines = metric_lines(uninterrupted)
    rows = [
        (
            line["step"],
            sorted({k.split("/")[0] for k in line if k.endswith("/loss")}),
            sorted(k.split("/")[1] for k in line if k.startswith("validation/")),
        )
        for line in lines
    ]
    both = ["long", "short"]
    assert rows == [
        (0, ["validation"], both),
        (4, both, []),
        (4, ["validation"], both),
        (6, both, []),  # a window closes where an adapter ends
        (6, ["validation"], ["short"]),
        (8, ["long"], []),
        (8, ["validation"], ["long"]),
        (9, ["long"], []),
        (9, ["validation"], ["long"]),
    ]
    for step, names in ((6, {"short", "long"}), (7, {"long"})):
        folder = uninterrupted / "checkpoints" / str(step)
        metadata = json.loads((folder / "metadata" / "metadata").read_text())
        assert {path.split("/")[0] for path in metadata["checksums"]["adapters"]} == names
        assert json.loads((folder / "data" / "metadata").read_text()).keys() == names
    for name, step in (("short", 6), ("long", 9)):
        described = json.loads((uninterrupted / "adapters" / name / "adapter.json").read_text())
        assert described["step"] == step


@pytest.mark.parametrize("step", [5, 6, 7])
def test_resuming_near_the_end_of_an_adapter(inputs, uninterrupted, tmp_path, step):
    workdir = after(uninterrupted, tmp_path / "run", step)
    short = workdir / "adapters" / "short" / "adapter.json"
    written = short.stat().st_mtime_ns if step > 6 else None
    run = Run(inputs, workdir)
    assert run.join() == 0, run.log.read_text()
    log = run.log.read_text()
    assert f"resumed at step {step}" in log
    assert ("'short': lora, finished at step 6" in log) == (step > 6)
    assert_same_outcome(workdir, uninterrupted)
    if written is not None:
        assert short.stat().st_mtime_ns == written


def test_killed_between_a_final_folder_and_the_next_state(inputs, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    run = Run(inputs, workdir, overrides={"checkpoints__every": 5})
    run.wait_until("adapter 'short' finished at step 6")
    run.process.kill()
    assert run.join() == -signal.SIGKILL
    assert latest_step(workdir / "checkpoints") == 5, "the run was killed too late for this test"
    left = final_adapter(workdir, "short")
    assert not (workdir / "adapters" / "long").exists()
    # The finished adapter is complete, and equal after its last step is repeated.
    for path, leaf in final_adapter(uninterrupted, "short").items():
        np.testing.assert_array_equal(left[path], leaf, err_msg=path)
    run = Run(inputs, workdir, overrides={"checkpoints__every": 5})
    assert run.join() == 0, run.log.read_text()
    assert "resumed at step 5" in run.log.read_text()
    assert_same_outcome(workdir, uninterrupted)


@pytest.fixture
def constant():
    """Function that makes the schedules of a run, and the overrides of the next, constant.

    Resuming equals starting with another number of steps, where the schedule does not depend on it.
    """

    def apply(workdir):
        settings = json.loads((workdir / "config.json").read_text())
        for adapter in settings["adapters"].values():
            adapter["optimizer"]["schedule"] |= {"kind": "constant"}
        (workdir / "config.json").write_text(json.dumps(settings))
        names = settings["adapters"]
        return {f"adapters__{name}__optimizer__schedule__kind": "constant" for name in names}

    return apply


def test_more_steps_of_an_adapter_that_the_state_no_longer_holds(
    inputs, uninterrupted, tmp_path, constant
):
    workdir = after(uninterrupted, tmp_path / "run", 7)
    overrides = {**constant(workdir), "adapters__short__steps": 8}
    run = Run(inputs, workdir, overrides=overrides)
    assert run.join() == 2, run.log.read_text()
    words = "config.adapters.short.steps: 8 steps for 'short', but it finished at step 6"
    assert f"error: {words}" in run.log.read_text()


def test_fewer_steps_end_the_adapters_that_still_train(inputs, uninterrupted, tmp_path, constant):
    workdir = after(uninterrupted, tmp_path / "run", 7)
    run = Run(inputs, workdir, overrides={**constant(workdir), "training__steps": 6})
    assert run.join() == 0, run.log.read_text()
    assert read_description(workdir / "adapters" / "long").step == 7
    assert read_description(workdir / "adapters" / "short").step == 6


def test_other_numbers_of_steps_with_a_schedule_that_depends_on_them(
    inputs, uninterrupted, tmp_path
):
    workdir = after(uninterrupted, tmp_path / "run", 5)
    run = Run(inputs, workdir, overrides={"adapters__short__steps": 7})
    assert run.join() == 2
    assert "config.adapters.short.steps was 6, is 7" in run.log.read_text()
