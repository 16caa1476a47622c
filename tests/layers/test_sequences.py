"""Bounds and sums of the sequences in packed rows, against plain loops."""

import jax
import numpy as np
from tolerances import ROUNDING

from moe_jax.layers.tokens import sequence_bounds, sequence_sums

# Several sequences, one of a single token; padding on the right, on the left, and all of a row.
IDS = np.array(
    [
        [1, 1, 1, 2, 3, 3, 3, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 2, 2, 2, 2, 2, 2, 3],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)


def test_bounds_are_the_ends_of_runs():
    first, last = sequence_bounds(IDS)
    for row, ids in enumerate(IDS):
        for place, number in enumerate(ids):
            begin = end = place
            while begin > 0 and ids[begin - 1] == number:
                begin -= 1
            while end + 1 < len(ids) and ids[end + 1] == number:
                end += 1
            assert (first[row, place], last[row, place]) == (begin, end)


def test_sums_and_their_gradient_are_those_of_the_sequences():
    rng = np.random.default_rng(0)
    # What stands before a sequence is large, and must leave no rounding behind.
    values = rng.standard_normal((*IDS.shape, 3)).astype(np.float32)
    values[0, :3] += 1e6
    weights = rng.standard_normal(values.shape).astype(np.float32)

    @jax.jit
    def run(values):
        sums, is_last = sequence_sums(values, IDS)
        return (
            sums,
            is_last,
            jax.grad(lambda v: (weighted(v) * is_last[..., None].astype(v.dtype)).sum())(values),
        )

    def weighted(values):
        return sequence_sums(values, IDS)[0] * weights

    sums, is_last, gradient = run(values)
    expected = np.zeros_like(values)
    for row, ids in enumerate(IDS):
        for number in set(ids.tolist()) - {0}:
            places = np.flatnonzero(ids == number)
            assert is_last[row, places].tolist() == [*[False] * (len(places) - 1), True]
            np.testing.assert_allclose(
                sums[row, places[-1]], values[row, places].sum(axis=0), **ROUNDING
            )
            expected[row, places] = weights[row, places[-1]]
    assert not is_last[IDS == 0].any()
    np.testing.assert_allclose(gradient, expected, **ROUNDING)
