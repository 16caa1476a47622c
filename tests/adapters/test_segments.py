"""Rows that belong to adapters."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.adapters.lora import LoraConfig
from moe_jax.adapters.segments import Segment, segments_of, update_rows

METHOD = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))
OTHER = LoraConfig(rank=3, alpha=4.0, target_modules=("q_proj",))


def test_rows_follow_each_other_in_the_order_of_the_methods():
    segments = segments_of({"b": METHOD, "a": OTHER}, {"a": 3, "b": 2})
    assert segments == (Segment("b", METHOD, 0, 2), Segment("a", OTHER, 2, 5))
    assert segments_of({}, {}) == ()


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 4, [10, 20, 30, 40]),
        (0, 1, [10, 2, 3, 4]),
        (1, 3, [1, 20, 30, 4]),
        (3, 4, [1, 2, 3, 40]),
    ],
)
def test_only_the_segments_rows_change(start, stop, expected):
    array = jnp.array([[1], [2], [3], [4]])
    seen = []

    def update(rows):
        seen.append(rows.shape)
        return rows * 10

    updated = update_rows(Segment("x", METHOD, start, stop), array, update)
    np.testing.assert_array_equal(updated[:, 0], expected)
    assert seen == [(stop - start, 1)]
