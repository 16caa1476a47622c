"""Signal handling and background writes."""

import collections
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType, TracebackType
from typing import Self

import jax

from moe_jax.errors import UserError
from moe_jax.processes.stop import all_stop, heed_sigterm, request_stop

_MAX_PENDING = 16
"""Largest number of pending writes; each holds memory."""


class Interrupts:
    """Context in which SIGTERM and SIGINT request a stop, and a second signal ends the process.

    With several processes a signal to any of them stops all, after a step that they agree on; then
    only a second SIGINT ends the process at once. Outside the main thread, where Python cannot
    handle signals, none is received.

    Attributes:
      received: the first signal; None before.
      step_seconds: seconds that a step takes, for the message; None if unknown.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.step_seconds: float | None = None
        self._activity: str | None = None
        self._former: dict[signal.Signals, object] = {}
        self._is_alone = jax.process_count() == 1
        self._all_stop = False

    def __enter__(self) -> Self:
        numbers = [signal.SIGINT]
        if self._is_alone:
            numbers.append(signal.SIGTERM)
        else:
            heed_sigterm()
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
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

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Context in which the run stops after `activity`, which messages name, not after a step.

        Args:
          activity: noun phrase.
        """
        self._activity = activity
        try:
            yield
        finally:
            self._activity = None

    def is_requested(self) -> bool:
        """True if the run must stop now; the same in all processes, which must all call this."""
        if self._is_alone:
            return self.received is not None
        if self._all_stop or all_stop():
            self._all_stop = True
            self.received = self.received or signal.SIGTERM
        return self._all_stop

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            os.write(sys.stderr.fileno(), f"\n{name} again: stopping at once\n".encode())
            os._exit(128 + number)
        self.received = signal.Signals(number)
        if not self._is_alone:
            request_stop()
        # os.write, because a handler may run in the middle of a print.
        seconds = self.step_seconds or 0.0
        step = f"this step, which takes about {seconds:.0f} s" if seconds >= 1.0 else "this step"
        line = f"{name}: stopping after {self._activity or step}"
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode())


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
