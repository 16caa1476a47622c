"""Data that is read during training: every row, in proportion, and exactly resumed."""

import json
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest

from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.config.parse import FieldError
from moe_jax.data import streaming
from moe_jax.data.pipeline import ORDER, load_train_data
from moe_jax.data.readers import read_rows
from moe_jax.data.streaming import load_streamed_data
from moe_jax.errors import DataError

VOCABULARY = 29
"""In the word tokenizer <s> is 1, </s> is 2, a is 3, b is 4, ..., z is 28."""


@pytest.fixture
def load(data_config, word_tokenizer):
    def load_data(sources, batch_size=2, seed=0, **fields):
        fields = {"streaming": True, "sort_window": 1, "shuffle_buffer": 5, **fields}
        config = data_config(sources, **fields)
        return load_streamed_data(config, word_tokenizer, batch_size, seed, vocab_size=VOCABULARY)

    return load_data


def sequences(batch):
    """Ids of each sequence of a batch, checking what else belongs to it."""
    found = []
    for ids, segments, positions, mask in zip(
        batch.tokens, batch.segment_ids, batch.positions, batch.loss_mask, strict=True
    ):
        for segment in range(1, segments.max() + 1):
            mine = segments == segment
            assert positions[mine].tolist() == list(range(mine.sum()))
            assert mask[mine].tolist() == [False] * (mine.sum() - 2) + [True] * 2
            found.append(tuple(ids[mine].tolist()))
    return found


def rows(letters, prompt="a"):
    return [(prompt, letter) for letter in letters]


def expected(letters, prompt="a"):
    return [(1, ord(prompt) - 94, ord(letter) - 94, 2) for letter in letters]


def test_an_epoch_has_every_row_once_and_the_next_another_order(load, completions):
    data = load(completions(rows("abcdefghijkl")), shuffle_buffer=100)
    epochs = [[s for _ in range(6) for s in sequences(next(data.iterator))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == expected("abcdefghijkl")
    assert len(set(map(tuple, epochs))) == 3
    assert expected("abcdefghijkl") not in epochs
    other = load(completions(rows("abcdefghijkl")), shuffle_buffer=100, seed=1)
    assert [s for _ in range(6) for s in sequences(next(other.iterator))] not in epochs


def test_rows_move_within_their_block_only(load, completions):
    data = load(completions(rows("abcdefghijkl")), shuffle_buffer=4)
    found = [s for _ in range(6) for s in sequences(next(data.iterator))]
    blocks = [found[start : start + 4] for start in (0, 4, 8)]
    assert [sorted(block) for block in blocks] == [expected(w) for w in ("abcd", "efgh", "ijkl")]


def test_files_are_read_in_another_order_every_epoch(load, write, tmp_path):
    for letter in "abcdefgh":
        write(f"d/{letter}.jsonl", [{"prompt": "a", "completion": letter}])
    data = load(SourceConfig(path=str(tmp_path / "d")), shuffle_buffer=1)
    epochs = [[s for _ in range(4) for s in sequences(next(data.iterator))] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected("abcdefgh")


def test_shares_of_a_mixture(load, completions):
    sources = {
        "one": completions(rows("abc", "x"), "one.jsonl", weight=3.0),
        "two": completions(rows("abcdefg", "y"), "two.jsonl", weight=1.0),
    }
    data = load(sources, batch_size=4)
    for _ in range(10):
        counts = Counter(sequence[1] for sequence in sequences(next(data.iterator)))
        assert counts == {26: 3, 27: 1}


def test_packed_windows_hold_the_rows_of_the_data_in_turn(load, completions):
    letters = [chr(97 + i % 26) for i in range(50)]
    lengths = np.random.default_rng(0).integers(1, 9, size=50)
    texts = [" ".join([letter] * n) for letter, n in zip(letters, lengths, strict=True)]
    source = completions([(text, "z z") for text in texts])
    data = load(source, packing="first_fit", max_length=20, sort_window=3, shuffle_buffer=1)
    ids = [
        (1, *[ord(text[0]) - 94] * int(n), 28, 28, 2)
        for text, n in zip(texts, lengths, strict=True)
    ]
    window = int(3 * 2 * 20 / (lengths.mean() + 4))
    found, padding = [], []
    for _ in range(30):
        batch = next(data.iterator)
        padding.append((batch.segment_ids == 0).mean())
        for row, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            numbers = range(1, segments.max() + 1)
            found += [tuple(row[segments == number].tolist()) for number in numbers]
    assert len(found) > 2 * 50
    for start in range(0, len(found) - window, window):
        expected_rows = [ids[number % 50] for number in range(start, start + window)]
        assert Counter(found[start : start + window]) == Counter(expected_rows)
    assert np.mean(padding) < 0.2


SETTINGS = [
    {"sort_window": 3, "buckets": (5, 7)},
    {"sort_window": 3, "packing": "first_fit", "max_length": 13},
    {"sort_window": 1, "shuffle_buffer": 1},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_run_resumes_at_every_batch(load, completions, settings):
    sources = {
        "one": completions([("a", "b c"), ("b", "c"), ("", "d"), ("a b c", "d e")], "1.jsonl"),
        "two": completions(rows("abcdefghijk", "x y"), "2.jsonl", weight=2.0),
    }
    whole, states, batches = load(sources, **settings), [], []
    for _ in range(17):
        states.append(json.dumps(whole.iterator.get_state()))
        batches.append(next(whole.iterator))
    for number in (0, 1, 2, 3, 8, 12):
        resumed = load(sources, **settings)
        assert resumed.fingerprint == whole.fingerprint
        resumed.iterator.set_state(json.loads(states[number]))
        for batch in batches[number : number + 5]:
            for mine, theirs in zip(next(resumed.iterator), batch, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_batches_are_of_the_same_kind_as_of_data_on_disk(
    load, data_config, completions, word_tokenizer
):
    source = completions([("a " * n, "b") for n in range(1, 9)])
    fields = {"sort_window": 4, "buckets": (6, 8), "max_length": 12}
    data = load(source, shuffle_buffer=100, **fields)
    stored = load_train_data(data_config(source, **fields), word_tokenizer, 2, 0)
    widths = [[next(d.iterator).tokens.shape for _ in range(4)] for d in (data, stored)]
    # Both have the short rows at the same places.
    assert widths[0] == widths[1]


def test_nothing_is_kept_on_disk(load, completions, tmp_path):
    folder = tmp_path / "cache"
    read_all(load(completions(rows("abcdef")), cache_dir=str(folder)), 5)
    assert not folder.exists()


def test_a_state_is_a_few_numbers(load, completions):
    """No rows, and no more of it after a thousand rows than after ten."""
    data = load(completions(rows("abcdefghijklmno")), shuffle_buffer=15, sort_window=4)
    sizes = []
    for _ in range(2):
        read_all(data, 30)
        sizes.append(len(json.dumps(data.iterator.get_state())))
    assert max(sizes) < 300


def test_the_fingerprint_follows_content_and_settings(load, completions, write):
    source = completions(rows("abcdef"))
    base = load(source).fingerprint
    assert load(source).fingerprint == base
    changed = load(source, shuffle_buffer=2).fingerprint
    assert changed["train/only"] == base["train/only"] and changed[ORDER] != base[ORDER]
    other = load(completions(rows("abcdeg"), "other.jsonl")).fingerprint
    assert other["train/only"] != base["train/only"] and other[ORDER] == base[ORDER]


def test_a_later_row_may_be_corrected_while_a_run_is_stopped(load, write):
    good = [{"prompt": "a", "completion": "b"}] * 300
    data = load(SourceConfig(path=write("a.jsonl", [*good, {"prompt": "a"}])))
    corrected = load(
        SourceConfig(path=write("b.jsonl", [*good, {"prompt": "a", "completion": "c"}]))
    )
    assert corrected.fingerprint == data.fingerprint


def test_few_rows_are_read_ahead(load, completions, monkeypatch):
    count = 0

    def counted(path):
        nonlocal count
        for item in read_rows(path):
            count += 1
            yield item

    monkeypatch.setattr(streaming, "read_rows", counted)
    data = load(completions(rows("abcde" * 1000)), shuffle_buffer=10, max_length=4)
    for _ in range(3):
        next(data.iterator)
    # 256 of the report; then three batches, those made ahead, and the block.
    assert count <= 256 + 2 * (3 + 10) + 10


def test_the_report(load, completions, write, tmp_path):
    write(
        "d/a.jsonl", [{"prompt": "a b c", "completion": "d e"}, {"prompt": "a", "completion": "b"}]
    )
    write("d/b.txt.doc", "")
    source = SourceConfig(path=str(tmp_path / "d"))
    assert load(source, max_length=5).report == (
        "only: streamed from 1 file (schema 'completion', by their columns), of the first 2 rows, "
        "1 truncated to 5 tokens, 4.5 tokens a row; skipped 1 (unknown kind: b.txt.doc)\n"
        "shuffled in blocks of 5 rows, padded to 5 tokens"
    )
    weighted = {"one": replace(source, weight=3.0), "two": source}
    lines = load(weighted, max_length=5, packing="first_fit", shuffle_buffer=9).report.splitlines()
    assert lines[2:] == [
        "share of the rows of a batch: one 75.0%, two 25.0%",
        "shuffled in blocks of 9 rows, packed into rows of 5 tokens",
    ]


def read_all(data, batches=200):
    for _ in range(batches):
        next(data.iterator)


def test_later_rows_are_checked(load, write):
    good = [{"prompt": "a", "completion": "b"}] * 300
    path = write("a.jsonl", [*good, {"prompt": "a"}])
    data = load(SourceConfig(path=path), shuffle_buffer=50)
    message = r"data\.train\.only: .*a\.jsonl: line 301: no column 'completion'"
    with pytest.raises(DataError, match=message):
        read_all(data)


def test_later_tokens_need_embeddings(data_config, write, word_tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] * 300
    path = write("a.jsonl", [*rows, {"prompt": "a", "completion": "z"}])
    config = data_config(SourceConfig(path=path), streaming=True, shuffle_buffer=50)
    data = load_streamed_data(config, word_tokenizer, 2, 0, vocab_size=VOCABULARY - 1)
    assert data.largest_tokens == {"only": 4}
    with pytest.raises(DataError, match=r"line 301: holds the token id 28, but the base has"):
        read_all(data)


def test_rows_without_a_target_are_passed_over(load, completions):
    data = load(completions([("a b c d", "e"), ("a", "b")]), max_length=4)
    assert [sequences(next(data.iterator)) for _ in range(2)] == [expected("b") * 2] * 2
    assert "1 dropped without a remaining target (first: " in data.report
    with pytest.raises(DataError, match=r"data\.train\.only: .*no row has a target"):
        load(completions([("a b c d", "e")], "long.jsonl"), max_length=4)


def test_rows_that_vanish_end_the_run(load, completions, tmp_path):
    data = load(completions(rows("abcd")), shuffle_buffer=2)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text("")
    with pytest.raises(DataError, match=r"data\.train\.only: holds no rows any more"):
        read_all(data)


def test_the_hub(load, write, tmp_path, monkeypatch):
    """The real `datasets.load_dataset`, with a folder in place of the id."""
    real, asked = datasets.load_dataset, []

    def load_from_folder(path, **arguments):
        asked.append((path, arguments["name"], arguments["split"], arguments["revision"]))
        assert arguments["streaming"] is True
        return real(str(tmp_path / "hub"), split=arguments["split"], streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_from_folder)
    content = [{"prompt": "a", "completion": letter} for letter in "abcdef"]
    write("hub/train.jsonl", content)
    source = SourceConfig(path="hf://datasets/some/set@v1", name="en")
    data = load(source, shuffle_buffer=4)
    assert data.report.startswith("only: streamed from the hub (schema 'completion', by their")
    state = data.iterator.get_state()
    epochs = [[s for _ in range(3) for s in sequences(next(data.iterator))] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [expected("abcdef")] * 2
    assert sorted(epochs[0][:4]) == expected("abcd")
    data.iterator.set_state(state)
    assert sequences(next(data.iterator)) == epochs[0][:2]
    assert set(asked) == {("some/set", "en", "train", "v1")}
    (tmp_path / "hub" / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"set@v1: cannot be read from the hub \(") as caught:
        load(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "source", "words"),
    [
        ({"num_workers": 2}, {"path": "a"}, "num_workers: must be 0 with streaming"),
        ({"shuffle_buffer": 0}, {"path": "a"}, "shuffle_buffer: must be positive"),
        ({}, {"task": "boolq"}, r"train\.x\.task: cannot be streamed"),
        ({}, {"path": "a", "split": "train[:9]"}, r"train\.x\.split: 'train\[:9\]' is a part"),
    ],
)
def test_settings_that_do_not_stream(fields, source, words):
    with pytest.raises(FieldError, match=words):
        DataConfig(train={"x": SourceConfig(**source)}, max_length=9, streaming=True, **fields)
