"""Metrics of classification against scikit-learn and scipy, and their errors against formulas."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from moe_jax.tasks.classification_metrics import measure


def noisy(rng, labels, classes, share):
    """Labels, a share of them replaced by random ones."""
    is_replaced = rng.random(len(labels)) < share
    return np.where(is_replaced, rng.integers(0, classes, len(labels)), labels)


@pytest.mark.parametrize("classes", [2, 3])
def test_class_metrics_equal_scikit_learns(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 300)
    predicted = noisy(rng, labels, classes, 0.4)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "matthews": sklearn.metrics.matthews_corrcoef(labels, predicted),
    }
    if classes == 2:
        expected["f1"] = sklearn.metrics.f1_score(labels, predicted)
    for name, value in expected.items():
        found = measure(name, predicted, labels)
        assert found.value == pytest.approx(value, abs=1e-12)
        assert found.rows == 300


def test_correlations_equal_scipys():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 11, 200) / 2.0  # with ties
    predicted = np.round(labels + rng.standard_normal(200), 1)
    expected = {
        "pearson": scipy.stats.pearsonr(predicted, labels).statistic,
        "spearman": scipy.stats.spearmanr(predicted, labels).statistic,
    }
    for name, value in expected.items():
        assert measure(name, predicted, labels).value == pytest.approx(value, abs=1e-12)
    assert expected["pearson"] != expected["spearman"]


def test_class_metrics_by_hand():
    # Of class 1: 3 found, 1 missed, 1 wrongly named; of class 0: 2 right. F1 = 6/8, and
    # Matthews' (3*2 - 1*1) / sqrt(4*4*3*3) = 5/12.
    labels, predicted = np.array([1, 1, 1, 1, 0, 0, 0]), np.array([1, 1, 1, 0, 1, 0, 0])
    assert measure("f1", predicted, labels).value == pytest.approx(6 / 8)
    assert measure("matthews", predicted, labels).value == pytest.approx(5 / 12)
    accuracy = measure("accuracy", predicted, labels)
    assert accuracy.value == pytest.approx(5 / 7)
    assert accuracy.standard_error == pytest.approx(math.sqrt(5 / 7 * 2 / 7 / 7))


def test_undefined_metrics_are_zero():
    same, labels = np.zeros(4, int), np.array([0, 1, 0, 1])
    for name in ("matthews", "f1"):
        assert measure(name, same, labels) == (0.0, None, 4)
    # 0.1 has no exact mean of three, whose error must not count as a spread.
    for name in ("pearson", "spearman"):
        assert measure(name, np.full(3, 0.1), np.array([1.0, 2.0, 4.0])).value == 0.0


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("f1", sklearn.metrics.f1_score),
        ("matthews", sklearn.metrics.matthews_corrcoef),
        ("pearson", lambda labels, found: scipy.stats.pearsonr(labels, found).statistic),
        ("spearman", lambda labels, found: scipy.stats.spearmanr(labels, found).statistic),
    ],
)
def test_standard_error_equals_the_spread_over_new_samples(name, reference):
    rng = np.random.default_rng(0)

    def drawn():
        if name in ("pearson", "spearman"):
            labels = rng.standard_normal(300)
            return labels, labels + rng.standard_normal(300)
        labels = rng.integers(0, 2, 300)
        return labels, noisy(rng, labels, 2, 0.5)

    spread = np.std([reference(*drawn()) for _ in range(100)])
    labels, predicted = drawn()
    found = measure(name, predicted, labels)
    assert found.standard_error == pytest.approx(spread, rel=0.3)
    assert found == measure(name, predicted, labels), "and is the same every time"


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_rows_that_are_all_right_tell_no_standard_error(name):
    labels = np.array([0, 1, 1] * 50)
    assert measure(name, labels, labels) == (1.0, None, 150)
