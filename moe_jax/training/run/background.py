"""Signal handling and background writes."""

import collections
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils

from moe_jax.errors import UserError

_MAX_PENDING = 16
"""Largest number of pending writes; each holds memory."""


class Interrupts:
    """Context in which SIGTERM and SIGINT request a stop, and a second signal ends the process.

    With several processes the signal arrives at a different step in each, so they agree on the step
    to stop after through `jax.distributed`; that covers SIGTERM, the signal of a preemption.
    Outside the main thread, where Python cannot handle signals, none is received.

    Attributes:
      received: the first signal; None before.
      step_seconds: seconds that a step takes, for the message; None if unknown.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.step_seconds: float | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def requested(self, step: int) -> bool:
        """True if the run must stop after `step`; the same in every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def is_received(self) -> bool:
        """True if this process has received a signal."""
        return self.received is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            os.write(sys.stderr.fileno(), f"\n{name} again: stopping at once\n".encode())
            os._exit(128 + number)
        self.received = signal.Signals(number)
        # os.write, because a handler may run in the middle of a print.
        seconds = self.step_seconds or 0.0
        duration = f", which takes about {seconds:.0f} s" if seconds >= 1.0 else ""
        os.write(sys.stderr.fileno(), f"\n{name}: saving after this step{duration}\n".encode())


class BackgroundWriter:
    """Thread that runs actions one after the other; the caller's next call raises their errors.

    With several processes, whose writes must happen in the same order in each, an action runs at
    once, in the caller's thread.

    Attributes:
      failed: True once the error of an action was raised; nothing may build on that action.
    """

    def __init__(self):
        self._threads = ThreadPoolExecutor(1, "background")
        self._pending: collections.deque[Future[None]] = collections.deque()
        self.failed = False

    def submit(self, action: Callable[[], None]) -> None:
        """Queues `action`; waits if the queue is full."""
        self.check()
        if len(self._pending) >= _MAX_PENDING:
            self._wait_for_first()
        if jax.process_count() > 1:
            action()
        else:
            self._pending.append(self._threads.submit(action))

    def check(self) -> None:
        """Raises the error of an action that has failed; does not wait."""
        while self._pending and self._pending[0].done():
            self._wait_for_first()

    def wait(self) -> None:
        """Waits for all actions; raises the first error."""
        while self._pending:
            self._wait_for_first()

    def _wait_for_first(self) -> None:
        try:
            self._pending.popleft().result()
        except BaseException:
            self.failed = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:  # an error that is being raised takes precedence over those of the actions
            while self._pending:
                with contextlib.suppress(UserError):
                    self._wait_for_first()
            self._threads.shutdown()
