"""Alternating timing of several steps, and summaries of the times. Needs jax only."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from moe_jax.errors import is_out_of_memory

OUT_OF_MEMORY = "out of memory"


class Spread(NamedTuple):
    """Median and range of several measurements."""

    median: float
    lowest: float
    highest: float


def spread(samples: Sequence[float]) -> Spread:
    """Median, minimum and maximum of the samples."""
    return Spread(statistics.median(samples), min(samples), max(samples))


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of one call, which must wait for its result."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    steps: Mapping[str, Callable[[], float]], rounds: int, untimed: int = 0
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Runs the steps alternately for some rounds, so that disturbances affect all of them.

    Each round starts with a different step.

    Args:
      steps: functions by name that run one step and return its seconds.
      rounds: number of timed rounds.
      untimed: number of warm-up rounds.

    Returns:
      Seconds of each step by name, and error messages by name of the steps that ran out of memory.
      Later rounds leave these steps out. Any other error is raised.
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
