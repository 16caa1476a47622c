"""Console of a run: lines, the time of long stages, and the progress bar."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from tqdm import tqdm

from moe_jax.terminal import encodable


def print_line(line: str) -> None:
    """Prints a line above the progress bar, and flushes it."""
    tqdm.write(encodable(line, sys.stdout))
    sys.stdout.flush()


@contextlib.contextmanager
def stage(say: Callable[[str], None], text: str) -> Iterator[None]:
    """Announces work that takes a while, and shows its elapsed time on a terminal."""
    say(text)
    if not sys.stderr.isatty():
        yield
        return
    start, ended = time.perf_counter(), threading.Event()

    def show() -> None:
        while not ended.wait(1.0):
            print(f"\r{time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        print("\r\033[K", end="", file=sys.stderr, flush=True)


class ProgressBar:
    """Progress bar with steps, loss, learning rate, speed and time left."""

    def __init__(self, total_steps: int, done: int, *, show: bool | None = None):
        """Shows the bar.

        Args:
          total_steps: steps of the whole run.
          done: steps done before, in a resumed run.
          show: None shows it if standard error is a terminal.
        """
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=None if show is None else not show,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Advances the bar to `step` and shows `values` beside it."""
        self._bar.set_postfix(values, refresh=False)
        self._bar.update(step - self._bar.n)
