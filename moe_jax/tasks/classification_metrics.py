"""The metrics of classification, from predictions and labels, with their standard errors.

The standard error of an accuracy is that of a binomial share, as in all other results. The others
are of a bootstrap over the rows (Efron 1979): the spread of the metric over samples of as many rows
with replacement. What is undefined, such as the correlation with predictions that are all the same,
is 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_jax.config.classification import MetricName

SAMPLES = 1000
"""Bootstrap samples; drawn alike every time."""


class Measured(NamedTuple):
    """A metric of some rows.

    Attributes:
      value: from -1 or 0 to 1.
      standard_error: of the value.
      rows: over how many rows.
    """

    value: float
    standard_error: float
    rows: int


def metric_value(metric: MetricName, predicted: np.ndarray, labels: np.ndarray) -> float:
    """A metric of predictions without its standard error, which draws samples; see `measure`."""
    if metric in _OF_COUNTS:
        return float(_OF_COUNTS[metric](confusion(predicted, labels)))
    return _OF_NUMBERS[metric](predicted, labels)


def measure(metric: MetricName, predicted: np.ndarray, labels: np.ndarray) -> Measured:
    """A metric of predictions.

    Args:
      metric: its name.
      predicted: classes as indices, or numbers; [n], at least one.
      labels: the right ones, [n].
    """
    value, rows = metric_value(metric, predicted, labels), len(labels)
    if metric == "accuracy":
        return Measured(value, math.sqrt(value * (1.0 - value) / rows), rows)
    rng = np.random.default_rng(0)
    if metric in _OF_COUNTS:
        counts = confusion(predicted, labels)
        # Drawing rows with replacement is drawing the counts of their kinds.
        drawn = rng.multinomial(rows, counts.ravel() / rows, size=SAMPLES)
        samples = _OF_COUNTS[metric](drawn.reshape(SAMPLES, *counts.shape))
    else:
        correlate = _OF_NUMBERS[metric]
        places = (rng.integers(0, rows, rows) for _ in range(SAMPLES))
        samples = np.array([correlate(predicted[at], labels[at]) for at in places])
    return Measured(value, float(np.std(samples, ddof=1)), rows)


def confusion(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many rows have each label (first axis) and each prediction; [K, K]."""
    size = max(2, int(predicted.max()) + 1, int(labels.max()) + 1)
    counts = np.zeros((size, size), np.int64)
    np.add.at(counts, (labels.astype(int), predicted.astype(int)), 1)
    return counts


def accuracy(counts: np.ndarray) -> np.ndarray:
    """The share of right answers, of confusion matrices [..., K, K]."""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def f1(counts: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall of class 1, of confusion matrices [..., 2, 2]."""
    right = counts[..., 1, 1]
    return _ratio(2.0 * right, counts[..., 1, :].sum(axis=-1) + counts[..., :, 1].sum(axis=-1))


def matthews(counts: np.ndarray) -> np.ndarray:
    """Matthews' correlation of confusion matrices [..., K, K], for any number of classes.

    As in Gorodkin 2004, equation 8: for two classes it is the original.
    """
    counts = counts.astype(np.float64)
    total = counts.sum(axis=(-2, -1))
    of_label, of_prediction = counts.sum(axis=-1), counts.sum(axis=-2)
    right = np.trace(counts, axis1=-2, axis2=-1)
    covariance = right * total - (of_label * of_prediction).sum(axis=-1)
    spread_label = total**2 - (of_label**2).sum(axis=-1)
    spread_prediction = total**2 - (of_prediction**2).sum(axis=-1)
    return _ratio(covariance, np.sqrt(spread_label * spread_prediction))


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """The linear correlation of two arrays [n]."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:  # whose rounding errors would correlate
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    spread = math.sqrt(float((first**2).sum()) * float((second**2).sum()))
    return float((first * second).sum()) / spread


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """The correlation of the ranks of two arrays [n]; equal values share their mean rank."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.zeros_like(under, np.float64), where=under > 0)


_OF_COUNTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
_OF_NUMBERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "pearson": pearson,
    "spearman": spearman,
}
