"""SIGTERM and Ctrl-C as a request to stop after the current step."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

import jax
from jax.experimental import multihost_utils


class Interrupts:
    """While entered, the first SIGTERM or SIGINT is noted and the second one ends the process.

    With several processes the signal reaches each at another step, so they agree through
    `jax.distributed` on the step to stop after; that covers SIGTERM, the signal of a preemption.
    Outside the main thread Python cannot handle signals and none is noted.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._note)
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
        """Whether to stop after `step`; every process gives the same answer for the same step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def noted(self) -> bool:
        """Whether a signal came to this process."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            os.write(sys.stderr.fileno(), f"\n{name} again: stopping at once\n".encode())
            os._exit(128 + number)
        self.received = signal.Signals(number)
        # os.write, because a handler may run in the middle of a print.
        os.write(sys.stderr.fileno(), f"\n{name}: saving after this step\n".encode())
