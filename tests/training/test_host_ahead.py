"""The host runs ahead of the device: records and saves do not wait, and lose nothing."""

import itertools
import math
import shutil
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from one_device import one_device
from tiny_run import final_adapter, metric_lines, read_config, write_inputs

from moe_jax.checkpoints.adapter_files import read_description
from moe_jax.checkpoints.store import TrainingStore, latest_step, read_metadata
from moe_jax.commands.process import keep_compiled_programs
from moe_jax.errors import CheckpointError, DataError, TrainingError, UserError
from moe_jax.training.records import recorder
from moe_jax.training.records import speed as speed_module
from moe_jax.training.records.recorder import Recorder
from moe_jax.training.run import session
from moe_jax.training.run.loop import train
from moe_jax.training.run.session import TrainingSession
from moe_jax.training.step.program import Program

STEPS, AHEAD, MEASURED_EVERY = 16, 4, 8
OVERRIDES = {
    "training__steps": STEPS,
    "training__log_every": 3,
    "training__eval_every": MEASURED_EVERY,
    "checkpoints__every": 5,
    "checkpoints__keep": 10,
    "adapters__default__data__buckets": "()",
}


class Watched:
    """Run on one device with the times of its events.

    Attributes:
      dispatched: number of steps dispatched so far.
      recorded: number of steps dispatched when the metrics of a step were read, by step.
      losses: losses by step.
      best_at: step of the best adapter on disk when a state was written, by step of the state.
    """

    def __init__(self, inputs, workdir):
        self.workdir = workdir
        self.dispatched, self.recorded, self.losses, self.best_at = 0, {}, {}, {}
        with one_device() as patch:
            for owner, name, watch in (
                (Program, "train_step", self._step),
                (Recorder, "_record", self._record),
                (TrainingStore, "write", self._write),
                (session, "capture_adapter", self._captured),
            ):
                original = getattr(owner, name)
                patch.setattr(owner, name, lambda *a, w=watch, o=original, **k: w(o, *a, **k))
            train(read_config(inputs, **OVERRIDES), workdir, lambda _: None)

    def _step(self, original, *arguments):
        self.dispatched += 1
        return original(*arguments)

    def _record(self, original, recorder, step, metrics):
        self.recorded[step], self.losses[step] = self.dispatched, metrics["default/loss"]
        original(recorder, step, metrics)

    def _write(self, original, store, step, *arguments, **more):
        best = self.workdir / "best" / "default"
        self.best_at[step] = read_description(best).step if best.exists() else None
        original(store, step, *arguments, **more)

    def _captured(self, original, *arguments):
        write = original(*arguments)

        def write_late():
            time.sleep(0.5)
            write()

        return write_late


@pytest.fixture(scope="module", autouse=True)
def fast_steps():
    """Steps count as fast, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "_SLOW_STEP", math.inf)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def watched(inputs, tmp_path_factory):
    return Watched(inputs, tmp_path_factory.mktemp("watched") / "run")


def test_metrics_are_read_after_later_steps_are_dispatched(watched):
    # The host waits for the device at validation, after steps 8 and 16, but not for a line every
    # third step or a state every fifth.
    measured = {s: math.ceil(s / MEASURED_EVERY) * MEASURED_EVERY for s in range(1, STEPS + 1)}
    ahead = {s: min(s + AHEAD, measured[s]) for s in range(1, STEPS + 1)}
    # It waits for the first step, since it does not know yet how long a step takes.
    assert watched.recorded == {**ahead, 1: 1}


def test_slow_steps_are_awaited_one_by_one(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "_SLOW_STEP", 0.0)
    assert Watched(inputs, tmp_path / "run").recorded == {s: s for s in range(1, STEPS + 1)}


def test_several_processes_do_not_go_by_their_clocks(inputs, watched, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "_SLOW_STEP", 0.0)
    monkeypatch.setattr(recorder, "jax", SimpleNamespace(process_count=lambda: 2))
    assert Watched(inputs, tmp_path / "run").recorded == watched.recorded


def test_a_state_has_the_metrics_of_its_step(watched):
    folder = watched.workdir / "checkpoints"
    assert sorted(int(each.name) for each in folder.iterdir()) == [5, 10, 15, 16]
    # Lines end with the third, ninth and fifteenth step.
    for step, since in ((5, [4, 5]), (10, [10]), (15, [])):
        metadata = read_metadata(folder, step)
        assert [each["default/loss"] for each in metadata["window"]] == [
            watched.losses[each] for each in since
        ]
    measured = {
        line["step"]: line["validation/default/held_out/loss"]
        for line in metric_lines(watched.workdir)
        if "validation/default/held_out/loss" in line
    }
    for step, last in ((5, 0), (10, 8), (15, 8), (16, 16)):
        validation = read_metadata(folder, step)["validation"]
        assert validation == {"default/held_out": measured[last]}


def test_the_best_adapter_is_written_before_a_state_that_refers_to_it(watched):
    assert watched.best_at == {5: None, 10: 8, 15: 8, 16: 16}


def failing_at(call, method, error):
    """The method, except that one call of it raises the error."""
    calls = itertools.count(1)

    def watched(*arguments, **more):
        if next(calls) == call:
            raise error
        return method(*arguments, **more)

    return watched


@pytest.fixture(scope="module")
def failing(inputs, tmp_path_factory):
    """Runs that fail after the save of step 5 starts and before it is written, at step 9."""
    folder = tmp_path_factory.mktemp("failing")

    def run(name, *failures):
        config = read_config(inputs, **OVERRIDES)
        with one_device() as patch:
            for owner, method, call, error in failures:
                patch.setattr(owner, method, failing_at(call, getattr(owner, method), error))
            with pytest.raises(UserError) as raised:
                train(config, folder / name, lambda _: None)
        return str(raised.value), folder / name / "checkpoints"

    return run


# Raised in the seventh step.
BAD_ROW = (Program, "put_train_batch", 7, DataError("row 57 cannot be read"))


def test_a_save_in_progress_is_completed_before_an_error_is_raised(failing, watched):
    error, folder = failing("data", BAD_ROW)
    kept = "the state at step 6 is saved; the same command resumes from it"
    assert error == f"row 57 cannot be read; {kept}"
    assert latest_step(folder) == 6
    saved, expected = (read_metadata(f, 5) for f in (folder, watched.workdir / "checkpoints"))
    for metadata in (saved, expected):
        del metadata["metrics"]["digest"]  # of lines with times
    assert saved == expected


def test_a_save_in_progress_is_completed_after_a_failed_step(failing):
    error, folder = failing("step", (Recorder, "_record", 3, TrainingError("step 3 went wrong")))
    assert error == "step 3 went wrong; the state at step 5 is kept"
    assert latest_step(folder) == 5


def test_a_save_in_progress_is_completed_when_out_of_memory(failing):
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    error, folder = failing("memory", (Program, "train_step", 7, full))
    assert error.startswith("out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9")
    assert "config.training.micro_batches" in error
    assert latest_step(folder) == 5


def test_the_first_error_is_raised(failing):
    full = (TrainingStore, "write", 1, CheckpointError("no space left"))
    error, folder = failing("both", BAD_ROW, full)
    assert error == "row 57 cannot be read; no state was saved before"
    assert latest_step(folder) is None


def test_no_state_refers_to_a_best_adapter_that_was_not_written(inputs, tmp_path, monkeypatch):
    begun = threading.Event()

    def captured(folder, adapter):
        def write():
            assert begun.wait(60)
            raise CheckpointError("no space left for the best")

        return write

    def save(run, *arguments, original=TrainingSession._save):
        original(run, *arguments)
        if run.progress.step == 10:  # deferred until its metrics are read; the best is of step 8
            begun.set()

    monkeypatch.setattr(session, "capture_adapter", captured)
    monkeypatch.setattr(TrainingSession, "_save", save)
    config = read_config(inputs, **OVERRIDES)
    with one_device(), pytest.raises(CheckpointError, match="no space left for the best"):
        train(config, tmp_path, lambda _: None)
    folder = tmp_path / "checkpoints"
    assert latest_step(folder) == 5
    assert read_metadata(folder, 5)["best"] == {}


def test_the_final_adapter_is_written_without_a_deleted_best_one(inputs, tmp_path, monkeypatch):
    best, printed = tmp_path / "best" / "default", []

    def finish(run, *arguments, original=TrainingSession._finish):
        shutil.rmtree(best)
        original(run, *arguments)

    monkeypatch.setattr(TrainingSession, "_finish", finish)
    with one_device():
        train(read_config(inputs, **OVERRIDES), tmp_path, printed.append)
    assert final_adapter(tmp_path)
    assert f"adapter 'default': its best weights are no longer in {best}" in printed


def test_host_share_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: now[0])
    speed = speed_module.Speed(rate=8e12)
    for _ in range(8):
        speed.add(10, 1e12)
    with speed.paused():
        now[0] += 7.0
    now[0] += 4.0
    speed.add_wait(3.0)
    # 8 steps of 10 tokens and 1 TFLOP in 4 seconds; in 3 of them the host waited for the device.
    expected = {
        "seconds_per_step": 0.5,
        "tokens_per_second": 20.0,
        "model_tflops_per_second": 2.0,
        "mfu": 0.25,
        "host_share": 0.25,
    }
    assert speed.measure() == expected
    assert speed.measure() == expected, "fewer than 8 steps since then"
    speed.add(30, 16e12)
    now[0] += 4.0
    assert speed.overall() == {  # of 9 steps in 8 seconds
        "seconds_per_step": round(8 / 9, 6),
        "tokens_per_second": 13.8,
        "model_tflops_per_second": 3.0,
        "mfu": 0.375,
    }


def test_without_a_step_there_is_no_speed():
    assert speed_module.Speed().overall() == {}


@pytest.fixture
def events(tmp_path, monkeypatch):
    """Counts of the events of JAX's compilation cache, in an empty folder."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    former = {name: jax.config.values[name] for name in names}
    counts = {}

    def count(event, **_):
        counts[event] = counts.get(event, 0) + 1

    jax.monitoring.register_event_listener(count)
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()
    yield counts
    jax.monitoring.unregister_event_listener(count)
    for name, value in former.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_run_compiles_nothing_and_is_equal(watched, inputs, tmp_path, events):
    keep_compiled_programs()
    misses, hits = "/jax/compilation_cache/cache_misses", "/jax/compilation_cache/cache_hits"
    first = Watched(inputs, tmp_path / "first")
    assert events[misses] > 0
    events.clear()
    second = Watched(inputs, tmp_path / "second")
    assert misses not in events
    assert events[hits] == events["/jax/compilation_cache/compile_requests_use_cache"] > 0
    for run in (first, second):
        for folder in ("adapters", "best"):
            expected = final_adapter(watched.workdir, folder=folder)
            for path, leaf in final_adapter(run.workdir, folder=folder).items():
                np.testing.assert_array_equal(leaf, expected[path], err_msg=path, strict=True)
        assert metric_lines(run.workdir) == metric_lines(watched.workdir)


def test_states_are_saved_by_time(inputs, tmp_path):
    fields = {
        "training__steps": 3,
        "training__eval_every": 0,
        "checkpoints__every": 1000,
        "checkpoints__minutes": 1e-6,
        "checkpoints__keep": 100,
    }
    with one_device():
        train(read_config(inputs, **{**OVERRIDES, **fields}), tmp_path, lambda _: None)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"1", "2", "3"}
