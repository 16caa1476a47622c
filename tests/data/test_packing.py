"""Packing: the examples of a row, and the contents of a packed batch."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from tolerances import PADDING_SHARE, WITHIN_A_WINDOW

from moe_jax.data.grouping import ShuffledRange
from moe_jax.data.packing import PackedBatches, first_fit
from moe_jax.data.pipeline import load_train_data, load_validation_data

ROW = 50


def packed(num_examples, batch_size=4, sort_window=5, seed=0, lengths=None, order=3):
    if lengths is None:
        lengths = np.random.default_rng(1).integers(2, ROW + 1, num_examples)
    stream = ShuffledRange(0, num_examples, [order])
    window = (ROW, batch_size, sort_window, num_examples, seed)
    return stream, PackedBatches(stream, lengths, *window), lengths


def test_first_fit_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    for count in (1, 2, 30, 300):
        lengths = rng.integers(1, ROW + 1, count)
        rows: list[list[int]] = []
        expected = []
        for length in lengths:
            fitting = [place for place, row in enumerate(rows) if sum(row) + length <= ROW]
            if not fitting:
                rows.append([])
            place = fitting[0] if fitting else len(rows) - 1
            rows[place].append(length)
            expected.append(place)
        assert first_fit(lengths, ROW).tolist() == expected


SHAPES = [(97, 4, 5), (96, 4, 5), (10, 4, 32), (3, 4, 32), (1, 4, 2), (64, 1, 8), (300, 2, 1)]


@pytest.mark.parametrize(("num_examples", "batch_size", "sort_window"), SHAPES)
def test_every_epoch_has_every_example_once_and_no_row_is_too_long(
    num_examples, batch_size, sort_window
):
    _, batches, lengths = packed(num_examples, batch_size, sort_window)
    flat = (row for index in range(10**6) for row in batches[index])
    orders = []
    for epoch in range(4):
        drawn, epoch_rows = [], 0
        while len(drawn) < num_examples:
            row = next(flat)
            assert len(row) >= 1 and lengths[row].sum() <= ROW
            drawn += row.tolist()
            epoch_rows += 1
        assert sorted(drawn) == list(range(num_examples))
        orders.append(drawn)
        # The number of rows of an epoch is that from which its steps are counted.
        before = batches.batches_of(epoch * num_examples)
        assert batches.batches_of((epoch + 1) * num_examples) - before in (
            epoch_rows // batch_size,
            -(-epoch_rows // batch_size),
        )
    if num_examples > 3:
        assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize(("num_examples", "batch_size", "sort_window"), SHAPES)
def test_windows_tile_the_stream_and_lie_within_an_epoch(num_examples, batch_size, sort_window):
    _, batches, lengths = packed(num_examples, batch_size, sort_window)
    most = max(1, sort_window * batch_size * ROW * num_examples // int(lengths.sum()))
    place = 0
    for number in range(60):
        first, stop = batches.window(number)
        assert first == place
        assert 1 <= stop - first <= most
        assert first // num_examples == (stop - 1) // num_examples
        place = stop


def test_a_windows_rows_are_its_examples_packed_longest_first():
    stream, batches, lengths = packed(400, batch_size=2, sort_window=10)
    flat = [row for index in range(60) for row in batches[index]]
    start = 0
    for number in range(3):
        first, stop = batches.window(number)
        examples = sorted(
            (stream[place] for place in range(first, stop)), key=lambda e: -lengths[e]
        )
        places = first_fit(lengths[examples], ROW)
        expected = {
            tuple(e for e, place in zip(examples, places, strict=True) if place == row)
            for row in range(places.max() + 1)
        }
        found = [tuple(row) for row in flat[start : start + len(expected)]]
        assert set(found) == expected
        start += len(expected)
        # Shuffled: the rows of the longest examples are not all in front.
        longest = [lengths[row[0]] for row in found]
        assert longest != sorted(longest, reverse=True)


def test_batches_are_independent_of_the_order_of_access():
    _, batches, _ = packed(120)
    in_order = [[row.tolist() for row in batches[index]] for index in range(60)]
    for index in (59, 0, 31, 17):
        _, fresh, _ = packed(120)
        assert [row.tolist() for row in fresh[index]] == in_order[index]
    for change in ({"seed": 1}, {"order": 4}):
        _, other, _ = packed(120, **change)
        assert [[row.tolist() for row in other[index]] for index in range(60)] != in_order


def test_part_of_an_epoch_is_counted_in_proportion_within_a_window():
    # Examples that fill half a row each: 40 rows an epoch, in one window.
    _, batches, _ = packed(80, batch_size=4, sort_window=100, lengths=np.full(80, ROW // 2))
    counts = [batches.batches_of(epochs * 80) for epochs in (0, 0.01, 0.1, 0.5, 1, 1.25, 3)]
    assert counts == [0, 1, 1, 5, 10, 13, 30]


def test_long_tailed_examples_leave_little_padding():
    drawn = np.random.default_rng(0).lognormal(np.log(12), 0.8, 20_000)
    lengths = np.clip(drawn.astype(int), 2, ROW)
    _, batches, _ = packed(20_000, 16, 32, lengths=lengths)
    rows = [row for index in range(200) for row in batches[index]]
    padding = 1 - sum(lengths[row].sum() for row in rows) / (ROW * len(rows))
    assert padding < 0.005
    assert np.mean([len(row) for row in rows]) > 2


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="an example of 51 tokens for rows of 50"):
        packed(3, lengths=np.array([3, 51, 4]))


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def rows_of_length(lengths):
    """Row i has the prompt of its own letter and `lengths[i]` tokens with <s> and </s>."""
    return [(LETTERS[i], " ".join("z" * (n - 3))) for i, n in enumerate(lengths)]


def letters(batch):
    """Letter of the prompt of every sequence, after its <s>."""
    return [LETTERS[token - 3] for token in batch.tokens[batch.positions == 1]]


@pytest.fixture
def load(data_config, word_tokenizer):
    def load_data(train, batch_size=2, seed=0, **fields):
        fields = {"packing": "first_fit", "max_length": 24, **fields}
        return load_train_data(data_config(train, **fields), word_tokenizer, batch_size, seed)

    return load_data


@pytest.fixture
def twenty(completions):
    return completions(rows_of_length(range(3, 23)))


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_holds_the_tokens_of_its_rows(load, completions):
    data = load(
        completions([("a b", "c"), ("d", "e")], expert_group=1),
        batch_size=1,
        max_length=11,
        train_on_prompt=True,
    )
    batch = next(data.iterator)
    # <s> a b c </s> is longer than <s> d e </s> and comes first, then two positions of padding.
    # All tokens except the first of a sequence are targets.
    assert batch.tokens.tolist() == [[1, 3, 4, 5, 2, 1, 6, 7, 2, 0, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0]]
    assert batch.loss_mask[0].astype(int).tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0]
    assert batch.expert_groups.tolist() == [[1] * 9 + [0, 0]]


def test_every_epoch_has_every_row_once_in_another_packing(load, twenty):
    # 250 tokens in eleven rows of 24; the rows with 22 and 21 tokens have no room for 3 more.
    data = load(twenty, batch_size=1)
    assert data.batches_of_epochs(1.0) == 11
    epochs = [[next(data.iterator) for _ in range(11)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(letter for batch in epoch for letter in letters(batch)) == list(LETTERS[:20])
    assert len({tuple(letter for batch in e for letter in letters(batch)) for e in epochs}) == 3
    assert data.num_rows == 20
    assert data.longest == 22
    assert data.padding_share == pytest.approx(1 - 250 / (11 * 24), abs=PADDING_SHARE)
    assert "packed, 1.8 to a row of 24 tokens: 5.2% of a batch is padding" in data.report


def test_sequences_equal_those_of_unpacked_batches(load, twenty):
    def sequences(batch):
        found = set()
        for number, ids in enumerate(batch.segment_ids):
            for segment in range(1, ids.max() + 1):
                own = ids == segment
                fields = (batch.tokens, batch.loss_mask, batch.positions, batch.expert_groups)
                found.add(tuple(tuple(field[number, own].tolist()) for field in fields))
        return found

    packed_data, unpacked = load(twenty, batch_size=1), load(twenty, packing="none")
    ours = set().union(*(sequences(next(packed_data.iterator)) for _ in range(11)))
    theirs = set().union(*(sequences(next(unpacked.iterator)) for _ in range(10)))
    assert ours == theirs and len(ours) == 20


def test_weights_are_shares_of_the_rows_of_the_data_sets(load, completions):
    sources = {
        "much": completions([("a", "z")] * 6, "much.jsonl", weight=3.0),
        "some": completions([("b", "z " * 15)] * 11, "some.jsonl", weight=1.0),
    }
    data, seen = load(sources, batch_size=3), Counter()
    for _ in range(100):
        seen.update(letters(next(data.iterator)))
    # Of every four rows three are of the first, though most tokens are of the second. At an end
    # that is not a window's, some rows have been moved.
    assert seen["a"] / seen["b"] == pytest.approx(3.0, rel=WITHIN_A_WINDOW)


@pytest.mark.parametrize("steps", [0, 1, 13])
def test_iteration_resumes_exactly_from_its_state(load, twenty, steps):
    data = load(twenty)
    for _ in range(steps):
        next(data.iterator)
    state = json.loads(json.dumps(data.iterator.get_state()))
    assert len(json.dumps(state)) < 200
    expected = [next(data.iterator) for _ in range(12)]
    fresh = load(twenty)
    fresh.iterator.set_state(state)
    assert all(map(same, expected, [next(fresh.iterator) for _ in range(12)]))


def test_fingerprint_depends_on_the_packing(load, twenty):
    before = load(twenty).fingerprint
    assert load(twenty).fingerprint == before
    assert load(twenty, buckets=(8,)).fingerprint == before  # which only validation is padded to
    for change in ({"packing": "none"}, {"seed": 1}, {"batch_size": 1}, {"max_length": 30}):
        now = load(twenty, **change).fingerprint
        assert now["train/only"] == before["train/only"]
        assert now["order"] != before["order"]


def test_validation_is_not_packed(data_config, word_tokenizer, twenty):
    fields = {"validation": {"held_out": twenty}, "max_length": 24, "buckets": (12,)}
    found = []
    for packing in ("none", "first_fit"):
        config = data_config(twenty, packing=packing, **fields)
        found.append(list(load_validation_data(config, word_tokenizer, 4)["held_out"]))
    assert all(map(same, *found))
    assert len(found[1]) == math.ceil(20 / 4)
