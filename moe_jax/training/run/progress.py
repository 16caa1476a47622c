"""A progress bar on a terminal; nothing where the output goes to a file or a pipe."""

import sys
from collections.abc import Mapping
from typing import Any, Self

from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line, above the bar where there is one; at once, also into a pipe."""
    tqdm.write(line)
    sys.stdout.flush()


class ProgressBar:
    """Steps done, loss, learning rate, speed, time left."""

    def __init__(self, total_steps: int, done: int, *, show: bool | None = None):
        """Shows the bar.

        Args:
          total_steps: of the whole run.
          done: steps done before, in a resumed run.
          show: None shows it if the standard error is a terminal.
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
        """Shows that `step` is done, and `values` beside it."""
        self._bar.set_postfix(values, refresh=False)
        self._bar.update(step - self._bar.n)
