"""Data pipeline from files to batches: mixture, epochs, resumption, validation."""

import json
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
import transformers

from moe_jax.config.data import SourceConfig
from moe_jax.data.grouping import LengthGroupedBatches
from moe_jax.data.pipeline import load_train_data, load_validation_data
from moe_jax.errors import DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def rows_of_length(lengths):
    """Row i has the prompt of its own letter and `lengths[i]` tokens with <s> and </s>."""
    return [(LETTERS[i], " ".join("z" * (n - 3))) for i, n in enumerate(lengths)]


def letters(batch):
    """The prompt's letter of each row: position 1, after <s>."""
    return [LETTERS[token - 3] for token in batch.tokens[:, 1]]


def take(data, batches):
    """The letters of the rows of the next batches."""
    return [letter for _ in range(batches) for letter in letters(next(data.iterator))]


@pytest.fixture
def twenty(completions):
    return completions(rows_of_length(range(3, 23)))


@pytest.fixture
def load(data_config, word_tokenizer):
    def load_data(train, batch_size=4, seed=0, **fields):
        return load_train_data(data_config(train, **fields), word_tokenizer, batch_size, seed)

    return load_data


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_epoch_has_every_row_once_in_another_order(load, twenty):
    data = load(twenty, sort_window=2)
    epochs = [take(data, 5) for _ in range(6)]
    assert data.num_rows == 20
    for epoch in epochs:
        assert sorted(epoch) == list(LETTERS[:20])
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_window_larger_than_the_data_still_gives_every_row_once_per_epoch(load, twenty):
    data = load(twenty, batch_size=5, sort_window=1000)
    for _ in range(4):
        epoch = [next(data.iterator) for _ in range(4)]
        assert sorted(letter for batch in epoch for letter in letters(batch)) == list(LETTERS[:20])
        # Sorted within the epoch: 3..7, 8..12, 13..17 and 18..22 tokens.
        longest = sorted(int(batch.segment_ids.sum(1).max()) for batch in epoch)
        assert longest == [7, 12, 17, 22]


def test_rows_that_do_not_fill_the_last_batch_are_not_lost(load, completions):
    data = load(completions(rows_of_length([3, 4, 5, 6, 7])), batch_size=3)
    seen = Counter()
    for _ in range(5):
        seen.update(letters(next(data.iterator)))
    assert seen == dict.fromkeys("abcde", 3)


def test_batches_are_padded_to_the_buckets(load, twenty):
    data = load(twenty, max_length=24, buckets=(8, 16), sort_window=5)
    widths = Counter()
    for _ in range(20):
        batch = next(data.iterator)
        lengths = batch.segment_ids.sum(1)
        width = batch.tokens.shape[1]
        assert batch.tokens.shape == (4, width)
        assert width == min(bucket for bucket in (8, 16, 24) if bucket >= lengths.max())
        assert same(batch.segment_ids, np.arange(width) < lengths[:, None])
        widths[width] += 1
    # Sorted lengths 3..6 | 7..10 | 11..14 | 15..18 | 19..22 in each of four epochs.
    assert widths == {8: 4, 16: 8, 24: 8}
    # Padded 8, 16, 16, 24, 24 times four rows; 250 tokens in 352 places.
    assert data.padding_share == pytest.approx(1 - 250 / 352, abs=0.01)
    assert "padded to 8, 16, 24 tokens: 29.0% of a batch is padding" in data.report


def test_batch_holds_the_tokens_of_its_rows(load, completions):
    batch = next(load(completions([("a b", "c")]), batch_size=2, max_length=6).iterator)
    # <s> a b c </s>, one place of padding; c and </s> are to be predicted.
    assert batch.tokens.tolist() == [[1, 3, 4, 5, 2, 0]] * 2
    assert batch.loss_mask.tolist() == [[False, False, False, True, True, False]] * 2
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 0]] * 2
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0]] * 2
    assert not batch.expert_groups.any()


def test_mixture_follows_the_weights(load, completions):
    sources = {
        "much": completions([("a", "z")] * 6, "much.jsonl", weight=3.0),
        "some": completions([("b", "z")] * 11, "some.jsonl", weight=1.0),
    }
    data = load(sources, batch_size=4)
    seen = Counter()
    for _ in range(100):
        seen.update(letters(next(data.iterator)))
    assert seen == {"a": 300, "b": 100}
    assert data.num_rows == 17
    assert "share of the rows of a batch: much 75.0%, some 25.0%" in data.report
    assert {line.split(":")[0] for line in data.report.splitlines()} >= {"much", "some"}


def test_every_row_carries_the_expert_group_of_its_source(
    load, data_config, word_tokenizer, completions
):
    sources = {
        "facts": completions([(letter, "z") for letter in "abc"], "facts.jsonl"),
        "tasks": completions([(letter, "z z") for letter in "xy"], "tasks.jsonl", expert_group=1),
    }
    data = load(sources, batch_size=4, sort_window=2)
    seen = set()
    for _ in range(10):
        batch = next(data.iterator)
        group = batch.expert_groups.max(axis=1)
        # The same at every token of a row, and 0 at its padding.
        np.testing.assert_array_equal(batch.expert_groups, group[:, None] * batch.segment_ids)
        seen |= set(zip(letters(batch), group.tolist(), strict=True))
    assert seen == {("a", 0), ("b", 0), ("c", 0), ("x", 1), ("y", 1)}

    config = data_config(sources["facts"], validation={"held_out": sources["tasks"]})
    (batch,) = load_validation_data(config, word_tokenizer, batch_size=3)["held_out"]
    assert batch.expert_groups.max(axis=1).tolist() == [1, 1, 0]  # the last row is empty


def test_sources_of_a_mixture_have_different_orders(load, completions):
    same_rows = rows_of_length([4] * 12)
    sources = {name: completions(same_rows, f"{name}.jsonl") for name in ("one", "two")}
    data = load(sources, batch_size=2, sort_window=1)
    pairs = [letters(next(data.iterator)) for _ in range(12)]
    assert sorted(first for first, _ in pairs) == sorted(second for _, second in pairs)
    assert any(first != second for first, second in pairs)


def test_seed_decides_the_order(load, twenty):
    streams = [load(twenty, seed=seed) for seed in (0, 0, 1)]
    first, again, other = ([next(s.iterator) for _ in range(10)] for s in streams)
    assert all(map(same, first, again))
    assert [letters(batch) for batch in first] != [letters(batch) for batch in other]
    assert streams[0].fingerprint == streams[1].fingerprint != streams[2].fingerprint


def test_fingerprint_depends_on_the_content_alone(load, completions, monkeypatch):
    rows = rows_of_length(range(3, 9))
    before = load(completions(rows)).fingerprint
    assert before.keys() == {"train/only", "order"}
    assert load(completions(rows, name="moved/elsewhere.jsonl")).fingerprint == before
    with monkeypatch.context() as newer:
        newer.setattr(transformers, "__version__", "99")
        newer.setattr(datasets, "__version__", "99")
        assert load(completions(rows)).fingerprint == before
    dropped = [*rows[:3], (" ".join("z" * 70), "z"), *rows[3:]]  # never in a batch
    assert load(completions(dropped)).fingerprint == before

    other_token = [*rows[:-1], (rows[-1][0], rows[-1][1].replace("z", "y", 1))]
    other_boundary = [*rows[:-1], (f"{rows[-1][0]} z", rows[-1][1].removeprefix("z "))]
    for changed in (other_token, other_boundary, rows[::-1]):
        now = load(completions(changed)).fingerprint
        assert now["train/only"] != before["train/only"]
    grouped = load(completions(rows, expert_group=1)).fingerprint
    assert grouped["train/only"] != before["train/only"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"batch_size": 2}, {"sort_window": 3}, {"buckets": (8,)}, {"shuffle": None}],
)
def test_fingerprint_depends_on_the_order(load, twenty, monkeypatch, change):
    before = load(twenty).fingerprint
    if "shuffle" in change:  # like another release
        plan = LengthGroupedBatches._plan_window
        monkeypatch.setattr(
            LengthGroupedBatches, "_plan_window", lambda *window: plan(*window)[::-1]
        )
        change = {}
    now = load(twenty, **change).fingerprint
    assert now["train/only"] == before["train/only"]
    assert now["order"] != before["order"]


@pytest.mark.parametrize("steps", [0, 1, 7, 23])
def test_iteration_resumes_exactly_from_its_state(load, twenty, steps):
    data = load(twenty, sort_window=3)
    for _ in range(steps):
        next(data.iterator)
    state = json.loads(json.dumps(data.iterator.get_state()))
    expected = [next(data.iterator) for _ in range(12)]
    fresh = load(twenty, sort_window=3)
    fresh.iterator.set_state(state)
    assert all(map(same, expected, [next(fresh.iterator) for _ in range(12)]))
    data.iterator.set_state(state)
    assert all(map(same, expected, [next(data.iterator) for _ in range(12)]))


def test_dropped_rows_are_not_in_the_stream(load, completions):
    rows = [("a", "z"), ("b b b b b b", "z"), ("c", "z")]
    data = load(completions(rows), batch_size=2, max_length=4)
    assert data.num_rows == 2
    assert "1 dropped" in data.report
    seen = Counter(letter for _ in range(5) for letter in letters(next(data.iterator)))
    assert seen == {"a": 5, "c": 5}


def test_validation_passes_every_row_once_and_fills_up_with_empty_ones(
    data_config, word_tokenizer, completions
):
    source = completions(rows_of_length([9, 3, 5, 4, 8]))
    config = data_config(source, validation={"held_out": source}, max_length=12, buckets=(4, 8))
    data = load_validation_data(config, word_tokenizer, batch_size=2)["held_out"]
    assert (data.num_rows, len(data)) == (5, 3)
    for _ in range(2):
        batches = list(data)
        assert [batch.tokens.shape for batch in batches] == [(2, 4), (2, 8), (2, 12)]
        assert [letters(batch) for batch in batches[:2]] == [["b", "d"], ["c", "e"]]
        assert letters(batches[2])[0] == "a"
        empty = [field[1] for field in batches[2]]
        assert not any(field.any() for field in empty)
        # One target token and </s> less than each row's length less <s> and the letter.
        targets = sum(int(batch.loss_mask.sum()) for batch in batches)
        assert targets == sum(n - 2 for n in [9, 3, 5, 4, 8])


def test_validation_is_empty_without_sources_and_names_bad_ones(
    data_config, word_tokenizer, completions, write
):
    source = completions([("a", "b")])
    assert load_validation_data(data_config(source), word_tokenizer, 2) == {}
    bad = SourceConfig(path=write("bad.json", [{"prompt": "a"}]), schema="completion")
    message = r"^data\.validation\.v: .*bad\.json: row 1: no column 'completion'"
    with pytest.raises(DataError, match=message):
        load_validation_data(data_config(source, validation={"v": bad}), word_tokenizer, 2)


IN_PROCESSES = """
import sys
from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.data import token_table
from moe_jax.data.pipeline import load_train_data
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import DataError

folder, good, bad, template, workers = sys.argv[1:]

def load(source):
    config = DataConfig(
        train={"only": source}, max_length=64, num_workers=int(workers), cache_dir=folder + "/cache"
    )
    return load_train_data(config, load_tokenizer(folder), 4, 0)

if workers == "0":
    token_table.encode_examples = None  # the cache has every row
data = load(SourceConfig(path=good, schema="completion"))
print(data.fingerprint, [next(data.iterator).tokens.tolist() for _ in range(5)])
try:
    load(SourceConfig(path=bad, schema="instruction", prompt=template))
except DataError as error:
    print(error)
"""


def test_worker_processes_give_the_same_rows_cache_and_errors(
    load, twenty, word_tokenizer, tmp_path, write
):
    """Runs in subprocesses, because this process has started JAX and must not fork."""
    word_tokenizer.save_pretrained(tmp_path)
    rows = [{"instruction": "a", "input": "b" * (i == 8), "output": "c"} for i in range(10)]
    bad, template = write("bad.json", rows), write("t.txt", "{instruction}")
    here = load(twenty, cache_dir=str(tmp_path / "other"))
    batches = [next(here.iterator).tokens.tolist() for _ in range(5)]
    refused = f"row 9: has an input, and {template} has no place for {{input}}"
    for workers in ("2", "0"):
        arguments = [str(tmp_path), twenty.path, bad, template, workers]
        finished = subprocess.run(
            [sys.executable, "-c", IN_PROCESSES, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        assert finished.stderr == ""
        assert finished.stdout.splitlines() == [
            f"{here.fingerprint} {batches}",
            f"data.train.only: {bad}: {refused}",
        ]
