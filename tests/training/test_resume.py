"""Resuming a run: when it continues, and when it is an error."""

import json
import shutil

import numpy as np
import pytest
from tiny_run import Run, final_adapter, metric_lines, write_inputs

from moe_jax.checkpoints.store import latest_step
from moe_jax.demo.tiny_llama import TINY_LLAMA, write_checkpoint

CONSTANT = {
    "adapters__default__optimizer__schedule__kind": "constant",
    "adapters__default__data__buckets": "()",
    "training__steps": 8,
    "training__eval_every": 0,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    run = Run(inputs, tmp_path_factory.mktemp("finished") / "run", overrides=CONSTANT)
    assert run.join() == 0, run.log.read_text()
    return run.workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """Copy of a run of 8 steps, saved at 5 and 8."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def halfway(workdir):
    """Copy of the run as it was after step 5."""
    shutil.rmtree(workdir / "checkpoints" / "8")
    shutil.rmtree(workdir / "adapters")
    return workdir


def outcome(inputs, workdir, **overrides):
    run = Run(inputs, workdir, overrides={**CONSTANT, **overrides})
    status = run.join()
    log = run.log.read_text()
    assert "Traceback" not in log
    return status, log


def refusal(inputs, workdir, **overrides):
    status, log = outcome(inputs, workdir, **overrides)
    assert status == 2, log
    error = log[log.index("error: ") :].rstrip("\n")
    assert "\n" not in error
    return error


def test_a_finished_run_does_nothing(inputs, workdir):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    status, log = outcome(inputs, workdir)
    folder = workdir / "adapters"
    words = f"already finished at step 8; its adapters are in {folder}; give another --workdir"
    assert (status, log) == (0, f"{words} to train again\n")
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()} == before


def test_a_run_killed_before_it_wrote_its_adapter_writes_it(inputs, workdir, finished):
    shutil.rmtree(workdir / "adapters")
    status, log = outcome(inputs, workdir)
    assert status == 0, log
    expected = final_adapter(finished)
    assert all((leaf == expected[p]).all() for p, leaf in final_adapter(workdir).items())
    assert metric_lines(workdir) == metric_lines(finished)


def test_lines_after_the_saved_step_are_replaced(inputs, halfway, finished):
    with (halfway / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "default/lo')  # cut off by a kill
    status, log = outcome(inputs, halfway)
    assert status == 0, log
    assert metric_lines(halfway) == metric_lines(finished)


def test_more_steps_with_a_constant_schedule(inputs, workdir):
    status, log = outcome(inputs, workdir, training__steps=12)
    assert status == 0, log
    assert "resumed at step 8" in log
    assert metric_lines(workdir)[-1]["step"] == 12
    assert json.loads((workdir / "adapters/default/adapter.json").read_text())["step"] == 12
    status, log = outcome(inputs, workdir, training__steps=10)
    assert status == 0, log
    assert "already finished at step 12" in log


def test_fewer_steps_end_a_run_at_its_saved_state(inputs, halfway, finished):
    cosine = {"adapters__default__optimizer__schedule__kind": "cosine"}
    settings = json.loads((halfway / "config.json").read_text())
    settings["adapters"]["default"]["optimizer"]["schedule"]["kind"] = "cosine"
    (halfway / "config.json").write_text(json.dumps(settings))
    status, log = outcome(inputs, halfway, **cosine, training__steps=1)
    assert status == 0, log
    assert "adapter 'default' finished at step 5" in log
    status, log = outcome(inputs, halfway, **cosine, training__steps=1)
    assert "already finished at step 5" in log
    # The run can still go on to its first length.
    settings["adapters"]["default"]["optimizer"]["schedule"]["kind"] = "constant"
    (halfway / "config.json").write_text(json.dumps(settings))
    status, log = outcome(inputs, halfway)
    assert status == 0, log
    assert "resumed at step 5" in log
    expected = final_adapter(finished)
    assert all((leaf == expected[p]).all() for p, leaf in final_adapter(halfway).items())


def test_more_steps_after_a_kill_before_the_first_was_saved(inputs, workdir):
    # The new number of steps is written by then, but no training state with it.
    settings = json.loads((workdir / "config.json").read_text())
    settings["training"]["steps"] = 12
    (workdir / "config.json").write_text(json.dumps(settings))
    status, log = outcome(inputs, workdir, training__steps=12)
    assert status == 0, log
    assert json.loads((workdir / "adapters/default/adapter.json").read_text())["step"] == 12


def test_more_steps_with_a_decaying_schedule(inputs, workdir):
    error = refusal(
        inputs,
        workdir,
        training__steps=12,
        adapters__default__optimizer__schedule__kind="linear",
    )
    assert "config.training.steps was 8, is 12" in error


def test_another_configuration(inputs, workdir):
    error = refusal(
        inputs, workdir, adapters__default__method__rank=8, adapters__default__batch_size=16
    )
    assert str(workdir) in error
    assert "config.adapters.default.batch_size was 8, is 16" in error
    assert "config.adapters.default.method.rank was 4, is 8" in error
    assert "give another --workdir" in error


def test_fields_that_may_differ(inputs, halfway):
    moved = halfway.parent / "moved"
    shutil.copytree(inputs.parent / "base", moved)
    for name in ("train", "held_out"):
        shutil.copy(inputs.parent / f"{name}.jsonl", moved)
    status, log = outcome(
        inputs,
        halfway,
        base__path=moved,
        adapters__default__data__train__words__path=moved / "train.jsonl",
        adapters__default__data__validation__held_out__path=moved / "held_out.jsonl",
        adapters__default__data__num_workers=2,
        checkpoints__every=3,
        checkpoints__keep=1,
        training__log_every=1,
        training__eval_every=2,
        training__max_skipped_steps=3,
        compute__remat="full",
    )
    assert status == 0, log
    assert "resumed at step 5" in log
    assert sorted(p.name for p in (halfway / "checkpoints").iterdir()) == ["8"]


def test_another_base(inputs, halfway):
    other = halfway.parent / "other"
    shutil.copytree(inputs.parent / "base", other)
    config = json.loads((other / "config.json").read_text())
    write_checkpoint(other, seed=1, **{k: v for k, v in config.items() if k in TINY_LLAMA})
    error = refusal(inputs, halfway, base__path=other)
    assert f"was trained on the base {inputs.parent / 'base'}" in error
    assert f"the weights in {other} differ from it" in error


@pytest.mark.parametrize("part", ["train/words", "validation/held_out"])
def test_other_data(inputs, halfway, part):
    name = {"train/words": "train"}.get(part, "held_out")
    file = inputs.parent / f"{name}.jsonl"
    content = file.read_text()
    try:
        file.write_text(content.replace("fox", "bird"))
        error = refusal(inputs, halfway)
    finally:
        file.write_text(content)
    assert f"the data of adapter 'default' changed since the run began ({part})" in error


def test_missing_and_damaged_configuration(inputs, workdir):
    (workdir / "config.json").unlink()
    assert "holds training states but no config.json" in refusal(inputs, workdir)
    (workdir / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refusal(inputs, workdir)


def test_two_runs_at_once(inputs, tmp_path):
    overrides = {**CONSTANT, "training__steps": 2000, "training__eval_every": 0}
    first = Run(inputs, tmp_path / "run", overrides=overrides)
    first.wait_until(" grad ")
    second = Run(inputs, tmp_path / "run", overrides=overrides, name="second")
    assert second.join() == 2
    assert "another run is using this work directory" in second.log.read_text()
    first.process.terminate()
    assert first.join() == 143, first.log.read_text()


def test_a_file_that_cannot_be_written_keeps_the_former_state(inputs, halfway, finished):
    """A limit on the size of files acts as a full disk, and needs no privilege."""
    run = Run(inputs, halfway, overrides=CONSTANT, file_bytes=12_000)
    log = run.log.read_text() if run.join() == 2 else ""
    error = log[log.index("error: ") :].rstrip("\n")
    assert f"cannot write {halfway / 'checkpoints'}" in error
    assert "file too large; fix that and run the same command again" in error
    assert "the state at step 5 is kept" in error
    assert "\n" not in error
    assert latest_step(halfway / "checkpoints") == 5

    status, log = outcome(inputs, halfway)
    assert status == 0, log
    expected = final_adapter(finished)
    assert all((leaf == expected[p]).all() for p, leaf in final_adapter(halfway).items())


def test_a_work_directory_that_is_a_file(inputs, tmp_path):
    (tmp_path / "run").write_text("")
    assert f"cannot write {tmp_path / 'run'}: file exists" in refusal(inputs, tmp_path / "run")


def test_streamed_data_resumes_exactly(inputs, tmp_path):
    data = "adapters__default__data"
    streamed = {f"{data}__streaming": True, f"{data}__shuffle_buffer": 7}
    status, log = outcome(inputs, tmp_path / "whole", **streamed)
    assert status == 0 and "words: streamed from 1 file, of the first 100 rows, " in log
    resumed = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "8")
    shutil.rmtree(resumed / "adapters")
    assert outcome(inputs, resumed, **streamed)[0] == 0
    assert metric_lines(resumed) == metric_lines(tmp_path / "whole")
    mine, theirs = final_adapter(resumed), final_adapter(tmp_path / "whole")
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(mine[path], leaf, err_msg=path)
    record = json.loads((resumed / "adapters" / "default" / "training.json").read_text())
    assert record["train"]["words"]["rows"] is None
    error = refusal(inputs, resumed, **streamed, training__steps=None, training__epochs=1)
    assert "config.training.epochs: adapters.default.data.streaming reads data of unknown" in error
