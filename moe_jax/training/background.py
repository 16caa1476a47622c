"""Writing while training goes on."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import jax

from moe_jax.errors import UserError


class Background:
    """Does one thing at a time in a thread of its own; errors are raised where it is waited for.

    With several processes, whose writes have to meet each other in the same order in each, it does
    everything at once.
    """

    def __init__(self):
        self._threads = ThreadPoolExecutor(1, "background")
        self._pending: Future[None] | None = None

    def start(self, action: Callable[[], None]) -> None:
        """Begins with `action` when the one before has ended, whose error is raised here."""
        self.wait()
        if jax.process_count() > 1:
            action()
        else:
            self._pending = self._threads.submit(action)

    def check(self) -> None:
        """Raises the error of the last action if it has failed by now; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being done; raises the error of the last action."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            # Where there is an error at hand already, let that be the one that is seen.
            with contextlib.nullcontext() if error is None else contextlib.suppress(UserError):
                self.wait()
        finally:
            self._threads.shutdown()
