"""Whether two methods differ by more than seeds do: spread, and the paired t-test."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from jax.scipy.special import betainc

SIGNIFICANT = 0.05
"""Chance below which a difference is no longer put down to seeds."""


class Spread(NamedTuple):
    """Mean and sample standard deviation (that of one value is 0) of one number over seeds."""

    mean: float
    deviation: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def chance(differences: Sequence[float]) -> float:
    """The p-value of the two-sided t-test that pairs do not differ, their differences given.

    It is the probability of a mean at least so far from 0 if seeds alone made the differences, and
    these were normal: 1 where all are 0, 0 where all are the same other number.

    Raises:
      ValueError: of less than two pairs no test can be made.
    """
    pairs = len(differences)
    if pairs < 2:
        raise ValueError(f"a paired test needs two pairs, got {pairs}")
    mean, deviation = spread(differences)
    if deviation == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    t, freedom = mean / (deviation / math.sqrt(pairs)), pairs - 1
    # The two tails of Student's t by the regularised incomplete beta function.
    return float(betainc(freedom / 2, 0.5, freedom / (freedom + t * t)))


def verdict(
    first: str, second: str, what: str, unit: str, digits: int, differences: Sequence[float]
) -> str:
    """A sentence about the differences `first` less `second` of pairs of an equal seed.

    Args:
      first: what the one is called.
      second: what the other is called.
      what: was measured.
      unit: of the differences.
      digits: after the point.
      differences: one for each seed.
    """
    mean, deviation = spread(differences)
    p, error = chance(differences), deviation / math.sqrt(len(differences))
    found = (
        "a difference beyond the spread over seeds, on this model and these questions"
        if p < SIGNIFICANT
        else "no difference beyond the spread over seeds"
    )
    tested = f"{len(differences)} pairs, t-test p = {p:.2g}"
    return (
        f"{what}: {first} less {second} is {mean:+.{digits}f} {unit}, "
        f"standard error {error:.{digits}f} ({tested}): {found}."
    )
