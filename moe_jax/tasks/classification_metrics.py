"""Metrics of classification and regression, with standard errors.

The standard error of an accuracy is that of a binomial proportion, as in all other results. Those
of other metrics come from a bootstrap over the rows (Efron 1979): the standard deviation of the
metric over samples of equal size with replacement. An undefined metric, such as the correlation
with constant predictions, is 0. The error of a value that is the same in all samples, such as an
accuracy of 1, is unknown.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_jax.config.classification import MetricName

SAMPLES = 1000
"""Number of bootstrap samples, drawn with a fixed seed."""


class Measurement(NamedTuple):
    """A measured metric.

    Attributes:
      value: value in [0, 1], or in [-1, 1] for a correlation.
      standard_error: standard error of the value; None if unknown.
      rows: number of rows.
    """

    value: float
    standard_error: float | None
    rows: int


def metric_value(metric: MetricName, predicted: np.ndarray, labels: np.ndarray) -> float:
    """Value of a metric without its standard error, which takes a bootstrap; see `measure`."""
    if metric in _COUNT_METRICS:
        return float(_COUNT_METRICS[metric](confusion(predicted, labels)))
    return _NUMBER_METRICS[metric](predicted, labels)


def measure(metric: MetricName, predicted: np.ndarray, labels: np.ndarray) -> Measurement:
    """Value and standard error of a metric.

    Args:
      metric: name of the metric.
      predicted: predicted class indices or numbers, [n], n >= 1.
      labels: true class indices or numbers, [n].
    """
    value, rows = metric_value(metric, predicted, labels), len(labels)
    if metric == "accuracy":
        return Measurement(value, math.sqrt(value * (1.0 - value) / rows) or None, rows)
    rng = np.random.default_rng(0)
    if metric in _COUNT_METRICS:
        counts = confusion(predicted, labels)
        # Sampling rows with replacement samples the counts of the matrix's cells.
        drawn = rng.multinomial(rows, counts.ravel() / rows, size=SAMPLES)
        samples = _COUNT_METRICS[metric](drawn.reshape(SAMPLES, *counts.shape))
    else:
        correlate = _NUMBER_METRICS[metric]
        resampled = (rng.integers(0, rows, rows) for _ in range(SAMPLES))
        samples = np.array([correlate(predicted[i], labels[i]) for i in resampled])
    return Measurement(value, float(np.std(samples, ddof=1)) or None, rows)


def confusion(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Confusion matrix [K, K]: number of rows by label (first axis) and prediction."""
    size = max(2, int(predicted.max()) + 1, int(labels.max()) + 1)
    counts = np.zeros((size, size), np.int64)
    np.add.at(counts, (labels.astype(int), predicted.astype(int)), 1)
    return counts


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of right predictions, of confusion matrices [..., K, K]."""
    return np.trace(counts, axis1=-2, axis2=-1) / counts.sum(axis=(-2, -1))


def f1(counts: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall of class 1, of confusion matrices [..., 2, 2]."""
    right = counts[..., 1, 1]
    return _ratio(2.0 * right, counts[..., 1, :].sum(axis=-1) + counts[..., :, 1].sum(axis=-1))


def matthews(counts: np.ndarray) -> np.ndarray:
    """Matthews correlation of confusion matrices [..., K, K], for any number of classes.

    As in Gorodkin 2004, equation 8, which is the original definition for two classes.
    """
    counts = counts.astype(np.float64)
    total = counts.sum(axis=(-2, -1))
    by_label, by_prediction = counts.sum(axis=-1), counts.sum(axis=-2)
    right = np.trace(counts, axis1=-2, axis2=-1)
    covariance = right * total - (by_label * by_prediction).sum(axis=-1)
    spread_label = total**2 - (by_label**2).sum(axis=-1)
    spread_prediction = total**2 - (by_prediction**2).sum(axis=-1)
    return _ratio(covariance, np.sqrt(spread_label * spread_prediction))


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Linear correlation of two arrays [n]."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:  # rounding errors would correlate
        return 0.0
    first, second = first - first.mean(), second - second.mean()
    spread = math.sqrt(float((first**2).sum()) * float((second**2).sum()))
    return float((first * second).sum()) / spread


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of the ranks of two arrays [n]; equal values share their mean rank."""
    return pearson(_ranks(first), _ranks(second))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    zeros = np.zeros_like(denominator, np.float64)
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


_COUNT_METRICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
_NUMBER_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "pearson": pearson,
    "spearman": spearman,
}
