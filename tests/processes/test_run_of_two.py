"""A training run of two processes: equal to one process, stopped, killed, resumed, evaluated."""

import json
import math
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from member_process import run_member
from tiny_run import final_adapter, fork_server, metric_lines, write_inputs
from tolerances import GRADIENT_ROUNDING
from xla_flags import xla_flags

from moe_jax.demo.corpus import write_tasks

STEPS = 8
FLAGS = [
    f"--config.training.steps={STEPS}",
    "--config.training.log_every=1",
    "--config.training.eval_every=4",
    "--config.checkpoints.every=2",
    "--config.adapters.default.data.buckets=()",
    "--config.adapters.default.optimizer.name=sgd",
    "--config.adapters.default.optimizer.learning_rate=0.1",
    "--config.adapters.default.optimizer.momentum=0.9",
    "--config.adapters.default.evaluation="
    + str({"tasks": ("colour",), "every": 4, "limit": 6, "batch_size": 3, "row_length": 64}),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    config = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_tasks(config.parent / "tasks", seed=0)
    return config


class Command:
    """`moe-jax train` in `count` processes, or in one with `count` devices."""

    def __init__(self, config, workdir, count=2, *, in_one=False, flags=(), others=(), slow=None):
        arguments = [f"--config={config}", f"--workdir={workdir}", *FLAGS, *flags]
        arguments.append(f"--config.tasks_folder={config.parent / 'tasks'}")
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        self.logs, self.processes = [], []
        for index in range(1 if in_one else count):
            mine = [*arguments, *(others if index else ())]
            if not in_one:
                mine += ["--distributed", f"--coordinator={address}", f"--num-processes={count}"]
                mine.append(f"--process-id={index}")
            self.logs.append(workdir.with_name(f"{workdir.name}.{time.monotonic_ns()}.{index}.log"))
            self.logs[-1].touch()
            target = (mine, self.logs[-1], count if in_one else 1, index == slow)
            self.processes.append(fork_server().Process(target=_main, args=target))
            self.processes[-1].start()

    def wait_until(self, words):
        deadline = time.monotonic() + 600
        while words not in self.logs[0].read_text():
            assert time.monotonic() < deadline, self.logs[0].read_text()
            assert self.processes[0].is_alive(), self.logs[0].read_text()
            time.sleep(0.01)

    def ends(self, seconds=600):
        """Exit status of each process, and its last line."""
        deadline, found = time.monotonic() + seconds, []
        for process, log in zip(self.processes, self.logs, strict=True):
            process.join(max(deadline - time.monotonic(), 0))
            assert process.exitcode is not None, log.read_text()
            lines = log.read_text().splitlines()
            found.append((process.exitcode, lines[-1] if lines else ""))
        return found


def _main(arguments, log, devices, is_slow):
    import jax

    from moe_jax.cli import main
    from moe_jax.training.records import recorder

    recorder._SLOW_STEP = 0.0 if is_slow else math.inf

    cache = Path(os.environ["HF_HOME"]).with_name("compiled")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["XLA_FLAGS"] = xla_flags(devices)
    run_member(log, lambda: main(["train", *arguments]))


def answers(workdir):
    """Scores of the final evaluation, by question."""
    lines = (workdir / "evaluation/predictions/default/colour.choices.jsonl").read_text()
    return [json.loads(line)["scores"] for line in lines.splitlines()[1:]]


@pytest.fixture(scope="module")
def together(inputs, tmp_path_factory):
    """Work directory and output of an undisturbed run of two processes."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    command = Command(inputs, workdir)
    assert [status for status, _ in command.ends()] == [0, 0], command.logs[0].read_text()
    return workdir, [log.read_text() for log in command.logs]


def test_two_processes_do_what_one_does(inputs, tmp_path, together):
    workdir, (first, second) = together
    assert "2 x cpu (data 2, fsdp 1, tensor 1)" in first
    assert "loss" not in second, "only the first process speaks"
    alone = Command(inputs, tmp_path / "run", in_one=True)
    assert alone.ends()[0][0] == 0, alone.logs[0].read_text()
    expected, actual = final_adapter(tmp_path / "run"), final_adapter(workdir)
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, **GRADIENT_ROUNDING, err_msg=path)
    one, two = metric_lines(tmp_path / "run"), metric_lines(workdir)
    assert [line.keys() for line in two] == [line.keys() for line in one]
    between = {line["step"] for line in two if any("colour" in name for name in str(line).split())}
    assert {4, STEPS} <= between, "evaluated during training and at the end"
    assert len(answers(workdir)) == 6
    for mine, other in zip(answers(workdir), answers(tmp_path / "run"), strict=True):
        np.testing.assert_allclose(mine, other, **GRADIENT_ROUNDING)


def test_a_process_whose_steps_take_long_writes_between_the_same_steps(inputs, tmp_path, together):
    command = Command(inputs, tmp_path / "run", slow=1)
    assert [status for status, _ in command.ends()] == [0, 0], command.logs[0].read_text()
    expected, actual = final_adapter(together[0]), final_adapter(tmp_path / "run")
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)


def test_stopped_and_killed_processes_resume_to_the_same_result(inputs, tmp_path, together):
    workdir = tmp_path / "run"
    stopped = Command(inputs, workdir)
    stopped.wait_until("step 2/")
    os.kill(stopped.processes[1].pid, signal.SIGTERM)
    ends = stopped.ends()
    assert [status for status, _ in ends] == [143, 143], stopped.logs[0].read_text()
    assert "; run the same command to resume" in ends[0][1]

    killed = Command(inputs, workdir)
    killed.wait_until("resumed at step")
    os.kill(killed.processes[1].pid, signal.SIGKILL)
    start = time.monotonic()
    ends = killed.ends()
    assert time.monotonic() - start < 60
    reason = "was killed, or its machine is lost; the same command resumes"
    assert ends == [(1, f"error: process 1 of 2 {reason}"), (-signal.SIGKILL, ends[1][1])]
    assert "***" not in killed.logs[0].read_text(), "no native stack trace"

    resumed = Command(inputs, workdir)
    assert [status for status, _ in resumed.ends()] == [0, 0], resumed.logs[0].read_text()
    expected, actual = final_adapter(together[0]), final_adapter(workdir)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)
    assert answers(workdir) == answers(together[0])


def test_a_file_that_one_process_lacks(inputs, tmp_path):
    others = [f"--config.adapters.default.data.train.words.path={tmp_path / 'none.jsonl'}"]
    ends = Command(inputs, tmp_path / "run", others=others).ends()
    reason = f"{tmp_path / 'none.jsonl'}: no such file"
    assert [status for status, _ in ends] == [2, 2]
    assert ends[0][1].startswith("error: process 1 of 2 ended: config.adapters.default.data.train")
    assert all(reason in line for _, line in ends)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_data_in_one_process(inputs, tmp_path):
    others = [f"--config.adapters.default.data.train.words.path={inputs.parent / 'other.jsonl'}"]
    ends = Command(inputs, tmp_path / "run", others=others).ends()
    words = "error: process 1 differs from process 0: the data of adapter 'default' (train/words)"
    assert all(status == 2 and line.startswith(words) for status, line in ends), ends


def test_other_settings_in_one_process(inputs, tmp_path):
    others = ["--config.adapters.default.method.alpha=9.0"]
    ends = Command(inputs, tmp_path / "run", others=others).ends()
    words = (
        "error: process 1 differs from process 0: config.adapters.default.method.alpha is 9.0, and "
        "8.0 in process 0; start all processes with the same command, code and files"
    )
    assert ends == [(2, words)] * 2
