"""The tokens of a batch along one axis, or one for each device."""

import itertools

import numpy as np
import pytest

from moe_jax.layers.token_axes import TokenAxes


@pytest.mark.parametrize(("shards", "shape"), [(1, (12,)), (2, (2, 6))])
def test_tokens_are_joined_and_parted(shards, shape):
    axes = TokenAxes(rows=4, length=3, shards=shards)
    array = np.random.default_rng(0).standard_normal((5, 4, 3, 2))
    joined = axes.join({"a": array}, before=1)["a"]
    assert joined.shape == (5, *shape, 2)
    assert axes.numbers.shape == shape
    for row, token in itertools.product(range(4), range(3)):
        number = 3 * row + token
        # A device has rows that follow each other, half of them each where there are two.
        place = (number,) if shards == 1 else (row // 2, 3 * (row % 2) + token)
        assert axes.numbers[place] == number
        for lead in range(5):
            np.testing.assert_array_equal(joined[lead, *place], array[lead, row, token])
    np.testing.assert_array_equal(axes.part(joined, before=1), array)
