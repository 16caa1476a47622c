"""Steps that are timed side by side, and what of their times is quoted; needs jax only."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from moe_jax import errors

OUT_OF_MEMORY = "out of memory"


class Spread(NamedTuple):
    """Of several measurements of the same thing."""

    median: float
    lowest: float
    highest: float


def spread(samples: Sequence[float]) -> Spread:
    return Spread(statistics.median(samples), min(samples), max(samples))


class OutOfMemory(Exception):
    """What was to be measured does not fit into memory; the others may."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of a device, did not do."""
    return isinstance(error, OutOfMemory) or errors.is_out_of_memory(error)


def seconds_of(function: Callable[[], object]) -> float:
    """How long one call takes; it has to wait for its own result."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    steps: Mapping[str, Callable[[], float]], rounds: int, untimed: int = 0
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Runs one step of each in turn, `rounds` times, so that what disturbs one disturbs all.

    Each round begins with another step, so that none always follows the same other one.

    Args:
      steps: by name, functions that do one step and return its seconds.
      rounds: how often.
      untimed: rounds before those, to warm up.

    Returns:
      The seconds of each step by name, and why steps failed, by name: those that ran out of memory
      are left out of the rounds that follow. Any other error is raised.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    names = list(steps)
    for turn in range(-untimed, rounds):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            try:
                seconds = steps[name]()
                if turn >= 0:
                    samples[name].append(seconds)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed[name] = OUT_OF_MEMORY
    return samples, failed
