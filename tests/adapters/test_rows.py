"""Rows that belong to adapters."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.rows import AdapterRows, divide_rows, replace_rows, take_rows

METHOD = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))
OTHER = LoraConfig(rank=3, alpha=4.0, target_modules=("q_proj",))


def test_rows_follow_each_other_in_the_order_of_the_methods():
    adapter_rows = divide_rows({"b": METHOD, "a": OTHER}, {"a": 3, "b": 2})
    assert adapter_rows == (AdapterRows("b", METHOD, 0, 2), AdapterRows("a", OTHER, 2, 5))
    assert divide_rows({}, {}) == ()


def test_every_shard_has_rows_of_every_adapter():
    # Six rows of b and two of a over two devices: three and one in each half of the batch.
    adapter_rows = divide_rows({"b": METHOD, "a": OTHER}, {"a": 2, "b": 6}, shards=2)
    assert adapter_rows == (AdapterRows("b", METHOD, 0, 3, 2), AdapterRows("a", OTHER, 3, 4, 2))
    assert [rows.total for rows in adapter_rows] == [6, 2]
    with pytest.raises(ValueError, match="3 rows of 'a' do not divide into 2 shards"):
        divide_rows({"b": METHOD, "a": OTHER}, {"a": 3, "b": 6}, shards=2)


ROWS = jnp.array([[1], [2], [3], [4]])
PLACES = [
    # From, to and the number of shards, and which of four rows these are.
    (0, 4, 1, [0, 1, 2, 3]),
    (0, 1, 1, [0]),
    (1, 3, 1, [1, 2]),
    (3, 4, 1, [3]),
    (0, 1, 2, [0, 2]),
    (1, 2, 2, [1, 3]),
    (0, 2, 2, [0, 1, 2, 3]),
    (0, 1, 4, [0, 1, 2, 3]),
]


def _batch_of(start, stop, shards):
    """Four rows, of which `x` has the given range and `before` and `after` the rest."""
    rest = [("before", 0, start), ("x", start, stop), ("after", stop, 4 // shards)]
    return [AdapterRows(n, METHOD, a, b, shards) for n, a, b in rest if a < b]


@pytest.mark.parametrize(("start", "stop", "shards", "mine"), PLACES)
def test_rows_of_an_adapter(start, stop, shards, mine):
    rows = AdapterRows("x", METHOD, start, stop, shards)
    np.testing.assert_array_equal(take_rows(rows, ROWS), ROWS[np.array(mine)])
    assert rows.total == len(mine)


@pytest.mark.parametrize(("start", "stop", "shards", "mine"), PLACES)
def test_only_the_adapters_rows_change(start, stop, shards, mine):
    tenfold = 10 * take_rows(AdapterRows("x", METHOD, start, stop, shards), ROWS)
    updated = replace_rows(_batch_of(start, stop, shards), ROWS, {"x": tenfold})
    expected = [10 * (i + 1) if i in mine else i + 1 for i in range(4)]
    np.testing.assert_array_equal(updated[:, 0], expected)


def test_each_adapter_changes_its_own_rows():
    # In each of two shards the first row is b's and the next two are a's.
    adapter_rows = divide_rows({"b": METHOD, "a": OTHER}, {"b": 2, "a": 4}, shards=2)
    array = jnp.arange(1, 7)[:, None]
    b, a = (take_rows(rows, array) for rows in adapter_rows)
    updated = replace_rows(adapter_rows, array, {"a": a * 10, "b": -b})
    np.testing.assert_array_equal(updated[:, 0], [-1, 20, 30, -4, 50, 60])


def test_new_rows_may_change_the_width_and_none_changes_nothing():
    adapter_rows = divide_rows({"b": METHOD}, {"b": 4}, shards=2)
    wide = replace_rows(adapter_rows, ROWS, {"b": jnp.tile(ROWS, (1, 3))})
    np.testing.assert_array_equal(wide, np.tile(ROWS, (1, 3)))
    assert replace_rows(adapter_rows, ROWS, {}) is ROWS
