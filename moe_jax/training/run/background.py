"""Writing while training goes on."""

import collections
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import jax

from moe_jax.errors import UserError

_MOST = 16
"""So many things may be waiting to be done; each holds memory."""


class Background:
    """Does one thing after the other in a thread of its own; errors are raised where it is asked.

    With several processes, whose writes have to meet each other in the same order in each, it does
    everything at once.

    Attributes:
      failed: whether the error of an action has been raised; what builds on it must not be done.
    """

    def __init__(self):
        self._threads = ThreadPoolExecutor(1, "background")
        self._pending: collections.deque[Future[None]] = collections.deque()
        self.failed = False

    def start(self, action: Callable[[], None]) -> None:
        """Has `action` done after those before; raises the error of one that has failed by now."""
        self.check()
        if len(self._pending) >= _MOST:
            self._take()
        if jax.process_count() > 1:
            action()
        else:
            self._pending.append(self._threads.submit(action))

    def check(self) -> None:
        """Raises the error of an action that has failed by now; does not wait."""
        while self._pending and self._pending[0].done():
            self._take()

    def wait(self) -> None:
        """Returns when nothing is left to be done; raises the first error."""
        while self._pending:
            self._take()

    def _take(self) -> None:
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
        finally:  # if there is an error at hand, let that be the one that is seen
            while self._pending:
                with contextlib.suppress(UserError):
                    self._take()
            self._threads.shutdown()
