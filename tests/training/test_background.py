"""Actions of the background writer run in order, and their errors reach the caller."""

import threading

import pytest

from moe_jax.errors import CheckpointError
from moe_jax.training.run.background import BackgroundWriter


def fail():
    raise CheckpointError("no space left on the disk")


def test_only_wait_waits():
    go_on, done = threading.Event(), []

    def slow():
        assert go_on.wait(30)
        done.append(threading.current_thread().name)

    with BackgroundWriter() as background:
        background.submit(slow)
        background.check()
        assert not done
        go_on.set()
        background.wait()
        assert len(done) == 1
        assert done[0] != threading.current_thread().name
        background.wait()


def test_actions_run_in_order():
    done = []
    with BackgroundWriter() as background:
        for number in range(40):  # more than the queue holds
            background.submit(lambda number=number: done.append(number))
    assert done == list(range(40))


@pytest.mark.parametrize("call", ["submit", "wait", "check", "end"])
def test_an_error_is_raised_by_the_next_call_and_once(call):
    ended = threading.Event()

    def fail_and_signal():
        try:
            fail()
        finally:
            ended.set()

    def run():
        with background:
            background.submit(fail_and_signal)
            if call == "wait":
                background.wait()
            assert ended.wait(30)
            while call != "end":  # a failed action counts as ended a moment later
                background.submit(lambda: None) if call == "submit" else background.check()

    background = BackgroundWriter()
    with pytest.raises(CheckpointError, match="no space left"):
        run()
    background.wait()


def test_the_error_of_the_caller_takes_precedence():
    def run():
        with BackgroundWriter() as background:
            background.submit(fail)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
