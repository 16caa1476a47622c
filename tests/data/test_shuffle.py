"""Every epoch is a permutation, and no two are alike."""

import pytest

from moe_jax.data.shuffle import ShuffledRange


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_every_epoch_has_every_number_once(size):
    rows = ShuffledRange(5, 5 + size, [0])
    for epoch in range(4):
        numbers = [rows[epoch * size + place] for place in range(size)]
        assert sorted(numbers) == list(range(5, 5 + size))


def test_orders_differ_by_epoch_and_by_seed_and_are_reproducible():
    def epochs(*seed):
        rows = ShuffledRange(0, 100, seed)
        return [tuple(rows[epoch * 100 + place] for place in range(100)) for epoch in range(5)]

    assert len({*epochs(0, 0), *epochs(0, 1), *epochs(1, 0)}) == 15
    assert epochs(0, 1) == epochs(0, 1)


def test_any_place_can_be_asked_for_alone():
    rows = ShuffledRange(0, 10, [0])
    in_order = [rows[index] for index in range(100)]
    fresh = ShuffledRange(0, 10, [0])
    assert [fresh[index] for index in reversed(range(100))] == in_order[::-1]


def test_place_in_an_epoch_is_uniform():
    rows = ShuffledRange(0, 4, [0])
    firsts = [rows[epoch * 4] for epoch in range(2000)]
    # 500 each, with a standard deviation of 19.
    assert all(400 < firsts.count(number) < 600 for number in range(4))
