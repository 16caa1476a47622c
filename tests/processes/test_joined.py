"""Processes that start together, agree, stop together and end together; nothing is trained."""

import ctypes
import functools
import os
import re
import signal
import socket
import sys
import time

import jax
import pytest
from member_process import run_member
from tiny_run import fork_server

import moe_jax
from moe_jax.cli import main
from moe_jax.errors import ConfigError
from moe_jax.processes.agreement import require_agreement
from moe_jax.processes.join import joined
from moe_jax.training.run.background import Interrupts

SOON = 60
"""Seconds within which all processes must have ended."""


class Group:
    """Processes 0 to `count - 1` of one run, each with a file of what it prints."""

    def __init__(self, folder, count, act, *, wait=SOON, start=True):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.count, self.act, self.wait = folder, count, act, wait
        self.processes = {}
        for index in range(count) if start else ():
            self.start(index)

    def start(self, index):
        self.log(index).write_text("")
        arguments = (index, self.count, self.port, self.wait, self.act, self.log(index))
        self.processes[index] = fork_server().Process(target=_member, args=arguments)
        self.processes[index].start()

    def log(self, index):
        return self.folder / f"process_{index}.log"

    def wait_until(self, words, indices=None):
        for index in self.processes if indices is None else indices:
            deadline = time.monotonic() + 300
            while words not in self.log(index).read_text():
                assert time.monotonic() < deadline, self.log(index).read_text()
                time.sleep(0.01)

    def kill(self, index, number):
        os.kill(self.processes[index].pid, number)

    def ends(self):
        """Exit status of each process and what it printed last, after at most `SOON` seconds."""
        deadline, found = time.monotonic() + SOON, []
        for index, process in self.processes.items():
            process.join(max(deadline - time.monotonic(), 0))
            assert process.exitcode is not None, self.log(index).read_text()
            lines = self.log(index).read_text().splitlines()
            found.append((process.exitcode, lines[-1] if lines else ""))
        return found


def _member(index, count, port, wait, act, log):
    def body():
        with joined(f"localhost:{port}", count, index, wait, print):
            print("together")
            act(index)
        return 0

    run_member(log, body)


def sleep(_):
    time.sleep(600)


def no_lines_of_libraries(group):
    for index in group.processes:
        text = group.log(index).read_text()
        assert "***" not in text and "terminate called" not in text, text


def test_processes_that_finish(tmp_path):
    ends = Group(tmp_path, 2, finish_at_different_times).ends()
    assert ends == [(0, "done"), (0, "done")]


def finish_at_different_times(index):
    time.sleep(2 * (1 - index))
    print("done")


def fail_in_process_2(index):
    if index == 2:
        raise ConfigError("/data/rows.jsonl: no such file")
    time.sleep(600)


def test_an_error_ends_all_with_its_reason(tmp_path):
    group = Group(tmp_path, 4, fail_in_process_2)
    ends = group.ends()
    assert ends[2] == (2, "error: /data/rows.jsonl: no such file")
    for end in (ends[0], ends[1], ends[3]):
        assert end == (2, "error: process 2 of 4 ended: /data/rows.jsonl: no such file")
    no_lines_of_libraries(group)


def exhaust_memory_in_process_0(index):
    if index == 0:
        raise MemoryError("no 10 GiB left")
    try:
        time.sleep(600)
    finally:
        print("not reached")


def test_an_exception_in_process_0(tmp_path):
    group = Group(tmp_path, 2, exhaust_memory_in_process_0)
    (status, last), other = group.ends()
    assert (status, last) == (1, "MemoryError: no 10 GiB left")
    reason = "failed: MemoryError: no 10 GiB left; the same command resumes"
    assert other == (1, f"error: process 0 of 2 {reason}")
    no_lines_of_libraries(group)


@pytest.mark.parametrize(("count", "killed"), [(2, 0), (4, 1)])
def test_a_killed_process_ends_the_others(tmp_path, count, killed):
    group = Group(tmp_path, count, sleep)
    group.wait_until("together")
    group.kill(killed, signal.SIGKILL)
    ends = group.ends()
    assert ends.pop(killed) == (-signal.SIGKILL, "together")
    reason = "was killed, or its machine is lost; the same command resumes"
    assert ends == [(1, f"error: process {killed} of {count} {reason}")] * (count - 1)
    no_lines_of_libraries(group)


def be_killed_in_the_shutdown_of_jax(killed, index):
    print("done")
    if index == killed:
        jax.distributed.shutdown = lambda: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_after_the_work_ends_the_other(tmp_path, killed):
    group = Group(tmp_path, 2, functools.partial(be_killed_in_the_shutdown_of_jax, killed))
    ends = group.ends()
    assert ends.pop(killed) == (-signal.SIGKILL, "done")
    reason = "was killed, or its machine is lost; the same command resumes"
    assert ends == [(1, f"error: process {killed} of 2 {reason}")]
    no_lines_of_libraries(group)


def fail_in_native_code_of_process_1(index):
    if index == 1:
        ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev()
    time.sleep(600)


def test_a_failure_in_native_code_ends_all(tmp_path):
    expected = (1, "error: process 1 of 2 failed in native code; the same command resumes")
    assert Group(tmp_path, 2, fail_in_native_code_of_process_1).ends() == [expected] * 2


def close_stderr_in_process_0(index):
    print("ready")
    if index == 0:
        sys.stderr.close()  # as after the end of `tee`
    time.sleep(600)


def test_a_process_that_cannot_print_ends_too(tmp_path):
    group = Group(tmp_path, 2, close_stderr_in_process_0)
    group.wait_until("ready")
    group.kill(1, signal.SIGKILL)
    assert [status for status, _ in group.ends()] == [1, -signal.SIGKILL]


def fail_after_the_other(index):
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    raise RuntimeError("a collective failed: connection closed by peer")


def test_an_exception_that_follows_from_the_end_of_another_process_is_not_shown(tmp_path):
    group = Group(tmp_path, 2, fail_after_the_other)
    status, last = group.ends()[0]
    assert status == 1
    assert last.startswith("error: process 1 of 2 was killed")
    assert "Traceback" not in group.log(0).read_text()


def fail_alike(index):
    raise ConfigError("config.training.steps: must be positive")


def test_an_error_of_all_processes_is_reported_by_each(tmp_path):
    own = (2, "error: config.training.steps: must be positive")
    assert Group(tmp_path, 2, fail_alike).ends() == [own, own]


def compare(index):
    seed = 3 if index == 2 else 0
    require_agreement({"config.training.seed": seed, "jax": "0.10.2"}, print)


def test_a_difference_ends_all_and_names_process_and_field(tmp_path):
    expected = (
        "error: process 2 differs from process 0: config.training.seed is 3, and 0 in process 0; "
        "start all processes with the same command, code and files"
    )
    assert Group(tmp_path, 4, compare).ends() == [(2, expected)] * 4


def load_a_base(_):
    moe_jax.load_base("moe_jax/demo/base")


def test_inference_refuses_to_be_one_of_several(tmp_path):
    expected = (
        "error: this process is one of 2: generation, evaluation and inspection run in one "
        "process, on its own devices, except the evaluation of a training run"
    )
    assert Group(tmp_path, 2, load_a_base).ends() == [(2, expected)] * 2


@pytest.mark.parametrize("command", ["evaluate", "generate", "inspect"])
def test_other_commands_have_no_flag_for_it(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--adapter=a", "--distributed"])
    assert "--distributed goes with `moe-jax train` only" in capsys.readouterr().err


def count_until_stopped(index):
    number = 0
    with Interrupts() as interrupts:
        print("counting")
        while not interrupts.is_requested():
            number += 1
            time.sleep(0.01 * (1 + index))  # the slower ones are awaited
    print(f"stopped by {interrupts.received.name} after {number}")


@pytest.mark.parametrize(
    ("count", "number", "signalled"),
    [(4, signal.SIGTERM, [1]), (2, signal.SIGINT, [1]), (2, signal.SIGINT, [0, 1])],
)
def test_a_signal_stops_all_processes_at_the_same_step(tmp_path, count, number, signalled):
    group = Group(tmp_path, count, count_until_stopped)
    group.wait_until("counting")
    for index in signalled:
        group.kill(index, number)
    ends = group.ends()
    assert [status for status, _ in ends] == [0] * count
    parts = [re.fullmatch(r"stopped by (\w+) after (\d+)", last) for _, last in ends]
    assert all(parts), ends
    assert len({part[2] for part in parts}) == 1, ends
    for index, part in enumerate(parts):
        assert part[1] == (number.name if index in signalled else "SIGTERM")


def test_a_late_process_is_awaited(tmp_path):
    group = Group(tmp_path, 2, finish_at_different_times, start=False)
    group.start(1)
    group.wait_until("waiting for process 0 at localhost:", [1])
    group.start(0)
    assert group.ends() == [(0, "done"), (0, "done")]
    assert "all 2 processes are there, after" in group.log(1).read_text()


def test_a_missing_process_is_named(tmp_path):
    group = Group(tmp_path, 3, sleep, wait=15, start=False)
    group.start(0)
    group.start(1)
    expected = (
        "--distributed: waited 15 s (--wait) for process 2 of 3; start them with the same command"
    )
    ends = group.ends()
    assert ends == [(2, f"error: {expected}"), (2, f"error: process 0 of 3 ended: {expected}")]
    lines = group.log(0).read_text().splitlines()
    assert "waiting for process 2 of 3, for up to 15 s (--wait)" in lines


def test_ctrl_c_while_waiting_ends_the_others(tmp_path):
    group = Group(tmp_path, 3, sleep, start=False)
    group.start(0)
    group.start(1)
    group.wait_until("waiting for the other processes", [1])
    group.kill(1, signal.SIGINT)
    ends = group.ends()
    assert ends[0] == (130, "stopped: process 1 of 3 was stopped by Ctrl-C")
    assert ends[1][0] == 130


def test_two_processes_with_one_index(tmp_path):
    group = Group(tmp_path, 3, sleep, start=False)
    group.start(0)
    group.start(1)
    group.wait_until("waiting for the other processes", [1])
    group.processes[2] = group.processes.pop(1)
    group.log(1).rename(group.log(2))
    group.start(1)
    group.processes[1].join(SOON)
    assert group.log(1).read_text() == "error: --process-id 1: is given to two processes\n"
    group.kill(2, signal.SIGKILL)
    assert group.ends()[0][0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, None, None), "give --coordinator and --num-processes and --process-id"),
        (("localhost:1", 2, 2), "--process-id: is 2, must be from 0 to 1 with 2 processes"),
        (("localhost", 2, 0), "--coordinator: is 'localhost', expected HOST:PORT"),
        (("localhost:99999", 2, 0), "--coordinator: is 'localhost:99999', expected HOST:PORT"),
    ],
)
def test_invalid_arguments(arguments, words, monkeypatch):
    monkeypatch.setattr("atexit.register", lambda *_: None)
    monkeypatch.setattr("moe_jax.processes.peers.Peers._exit_later", lambda *_: None)
    with pytest.raises(ConfigError, match=re.escape(words)), joined(*arguments, 1, print):
        pytest.fail("joined")
