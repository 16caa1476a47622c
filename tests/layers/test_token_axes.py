"""The tokens of a batch along one axis, or one for each device."""

import numpy as np
import pytest

from moe_jax.layers.token_axes import TokenAxes


@pytest.mark.parametrize(("shards", "shape"), [(1, (12,)), (2, (2, 6))])
def test_tokens_are_joined_and_parted(shards, shape):
    axes = TokenAxes(rows=4, length=3, shards=shards)
    array = np.arange(5 * 4 * 3 * 2).reshape(5, 4, 3, 2)
    joined = axes.join({"a": array}, before=1)["a"]
    assert joined.shape == (5, *shape, 2)
    # A device's rows, half of them each, are its tokens.
    np.testing.assert_array_equal(joined.reshape(5, shards, -1), array.reshape(5, shards, -1))
    np.testing.assert_array_equal(axes.part(joined, before=1), array)
    np.testing.assert_array_equal(axes.numbers.ravel(), np.arange(12))
    assert axes.numbers.shape == shape
