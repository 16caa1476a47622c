"""What is done in the background fails in the foreground."""

import threading

import pytest

from moe_jax.errors import CheckpointError
from moe_jax.training.run.background import Background


def fail():
    raise CheckpointError("no space left on the disk")


def test_nobody_waits_until_asked_to():
    go_on, done = threading.Event(), []

    def slow():
        assert go_on.wait(30)
        done.append(threading.current_thread().name)

    with Background() as background:
        background.start(slow)
        background.check()
        assert not done
        go_on.set()
        background.wait()
        assert len(done) == 1
        assert done[0] != threading.current_thread().name
        background.wait()


def test_things_are_done_one_after_the_other():
    done = []
    with Background() as background:
        for number in range(40):  # more than may wait
            background.start(lambda number=number: done.append(number))
    assert done == list(range(40))


@pytest.mark.parametrize("ask", ["start", "wait", "check", "end"])
def test_an_error_is_raised_at_the_next_opportunity_and_once(ask):
    ended = threading.Event()

    def fail_and_say():
        try:
            fail()
        finally:
            ended.set()

    def run():
        with background:
            background.start(fail_and_say)
            if ask == "wait":
                background.wait()
            assert ended.wait(30)
            while ask != "end":  # what failed counts as ended a moment later
                background.start(lambda: None) if ask == "start" else background.check()

    background = Background()
    with pytest.raises(CheckpointError, match="no space left"):
        run()
    background.wait()


def test_the_error_at_hand_is_the_one_that_is_seen():
    def run():
        with Background() as background:
            background.start(fail)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
