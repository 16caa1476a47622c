"""Grouping by length moves rows within a window and does nothing else."""

import numpy as np
import pytest

from moe_jax.data.grouping import LengthGroupedBatches, ShuffledRange, position_numbers


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


def test_positions_are_independent_of_the_order_of_access():
    rows = ShuffledRange(0, 10, [0])
    in_order = [rows[index] for index in range(100)]
    fresh = ShuffledRange(0, 10, [0])
    assert [fresh[index] for index in reversed(range(100))] == in_order[::-1]


def test_position_in_an_epoch_is_uniform():
    rows = ShuffledRange(0, 4, [0])
    firsts = [rows[epoch * 4] for epoch in range(2000)]
    # 500 each, with a standard deviation of 19.
    assert all(400 < firsts.count(number) < 600 for number in range(4))


def grouped(num_rows, batch_size, sort_window, seed=0, lengths=None):
    if lengths is None:
        lengths = np.random.default_rng(1).integers(1, 100, num_rows)
    stream = ShuffledRange(0, num_rows, [3])
    batches = LengthGroupedBatches(stream, lengths, batch_size, sort_window, num_rows, seed)
    return stream, batches, lengths


SHAPES = [(97, 4, 5), (96, 4, 5), (10, 4, 32), (3, 4, 32), (1, 4, 2), (64, 1, 8), (7, 7, 1)]


@pytest.mark.parametrize(("num_rows", "batch_size", "sort_window"), SHAPES)
def test_windows_tile_the_batches(num_rows, batch_size, sort_window):
    _, batches, _ = grouped(num_rows, batch_size, sort_window)
    index = 0
    while index < 200:
        first, stop = batches.window(index)
        assert first == index
        assert 1 <= stop - first <= sort_window
        assert all(batches.window(inside) == (first, stop) for inside in range(first, stop))
        index = stop


@pytest.mark.parametrize(("num_rows", "batch_size", "sort_window"), SHAPES)
def test_each_window_holds_the_rows_of_the_stream(num_rows, batch_size, sort_window):
    stream, batches, _ = grouped(num_rows, batch_size, sort_window)
    first = 0
    while first < 100:
        _, stop = batches.window(first)
        here = np.concatenate([batches[i] for i in range(first, stop)])
        there = [stream[i] for i in range(first * batch_size, stop * batch_size)]
        assert sorted(here) == sorted(there)
        first = stop


@pytest.mark.parametrize(("num_rows", "batch_size", "sort_window"), SHAPES)
def test_every_row_comes_once_before_any_comes_again(num_rows, batch_size, sort_window):
    _, batches, _ = grouped(num_rows, batch_size, sort_window)
    counts = np.zeros(num_rows, int)
    for index in range(5 * num_rows // batch_size + 5):
        epoch = index * batch_size // num_rows
        np.add.at(counts, batches[index], 1)
        # A batch can span the boundary of two epochs.
        spill = -(-batch_size // num_rows)
        assert counts.max() <= epoch + 1 + spill
        if (index + 1) * batch_size % num_rows == 0:
            assert set(counts) == {(index + 1) * batch_size // num_rows}


def test_batches_hold_rows_of_similar_length_and_are_shuffled():
    _, batches, lengths = grouped(800, 8, 100)
    spans = [np.ptp(lengths[batches[i]]) for i in range(100)]
    assert max(spans) <= 5  # 800 rows over 99 lengths: a batch of eight spans one or two
    means = np.array([lengths[batches[i]].mean() for i in range(100)])
    assert abs(np.corrcoef(means, np.arange(100))[0, 1]) < 0.4


def test_window_of_one_keeps_the_order_of_the_stream():
    stream, batches, _ = grouped(30, 4, 1)
    for index in range(20):
        assert batches[index].tolist() == [stream[index * 4 + i] for i in range(4)]


def test_epochs_differ_and_batches_are_independent_of_the_order_of_access():
    _, batches, _ = grouped(40, 4, 5)
    in_order = [batches[i].tolist() for i in range(30)]
    assert in_order[:10] != in_order[10:20]
    _, fresh, _ = grouped(40, 4, 5)
    for index in np.random.default_rng(0).permutation(30):
        assert fresh[int(index)].tolist() == in_order[index]
    _, other, _ = grouped(40, 4, 5, seed=1)
    assert [other[i].tolist() for i in range(30)] != in_order


def test_rows_of_one_length_keep_their_shuffled_order_within_a_window():
    stream, batches, _ = grouped(12, 3, 4, lengths=np.full(12, 5))
    expected = sorted(tuple(stream[i * 3 + j] for j in range(3)) for i in range(4))
    assert sorted(tuple(batches[i]) for i in range(4)) == expected


def test_rank_of_a_position_selects_the_batch():
    _, batches, lengths = grouped(60, 3, 5, seed=4)
    for first in range(0, 60, 5):
        assert batches.window(first) == (first, first + 5)
        # The position with the smallest number has the shortest rows, and so on.
        by_number = np.argsort(position_numbers(4, first, first + 5))
        rows = np.concatenate([lengths[batches[first + int(place)]] for place in by_number])
        assert rows.tolist() == sorted(rows)


def test_position_numbers_are_independent_of_the_range():
    numbers = position_numbers(7, 0, 5000)
    assert len(np.unique(numbers)) == 5000
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.02
    for first, stop in ((0, 1), (1023, 1024), (1020, 1030), (1024, 3073), (4999, 5000)):
        np.testing.assert_array_equal(position_numbers(7, first, stop), numbers[first:stop])
    assert (position_numbers(8, 0, 100) != numbers[:100]).all()


def long_tailed(num_rows, batch_size, row_seed, grouping_seed):
    """A stream of an adapter, and its rows' lengths: a median of 120, a tenth above 330."""
    drawn = np.random.default_rng(row_seed).lognormal(np.log(120), 0.8, num_rows)
    lengths = np.clip(drawn.astype(int) + 8, 1, 1024)
    rows = ShuffledRange(0, num_rows, [row_seed])
    return LengthGroupedBatches(rows, lengths, batch_size, 32, num_rows, grouping_seed), lengths


def joint_padding(streams, steps=400):
    """Share of padding where each step's batches are side by side, padded to the longest row."""
    tokens = padded = 0
    for index in range(steps):
        rows = np.concatenate([lengths[batches[index]] for batches, lengths in streams])
        tokens += rows.sum()
        padded += rows.max() * len(rows)
    return 1 - tokens / padded


def test_rows_of_several_adapters_have_similar_length():
    sizes = ((20_000, 16), (7_000, 8), (3_000, 8))
    apart = [long_tailed(*size, seed, grouping_seed=seed) for seed, size in enumerate(sizes)]
    together = [long_tailed(*size, seed, grouping_seed=0) for seed, size in enumerate(sizes)]
    alone = max(joint_padding([stream]) for stream in together)
    assert alone < 0.13
    # With separate seeds, nearly half of a step is padding.
    assert joint_padding(apart) > 0.4
    assert joint_padding(together) < 0.2
