"""Rows to classify: their ids and labels, and messages about invalid rows."""

import json

import numpy as np
import pytest

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import SourceConfig
from moe_jax.data.encoding import encode_texts
from moe_jax.data.pipeline import load_train_data, load_validation_data
from moe_jax.data.schema import label_number
from moe_jax.errors import DataError

MOODS = ClassificationConfig(labels=("sad", "glad"))
NUMBER = ClassificationConfig(regression=True)


@pytest.fixture
def source(tmp_path):
    """Writes rows and returns their data set."""

    def write(*rows, **fields):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SourceConfig(path=str(file), schema="classification", **fields)

    return write


def rows_of(batch):
    """(ids, position of the label, label) of each row."""
    rows = zip(batch.tokens, batch.segment_ids, batch.loss_mask, batch.labels, strict=True)
    return [
        (ids[real > 0].tolist(), np.flatnonzero(mask).tolist(), labels[mask].tolist())
        for ids, real, mask, labels in rows
    ]


# In the word tokenizer <s> is 1, </s> is 2, a is 3, b is 4, c is 5, and so on.
def test_rows_are_texts_with_their_label_at_the_last_token(source, data_config, word_tokenizer):
    own = source(
        {"text": "a b", "label": "glad"},
        {"text": "a b c", "text_pair": "d e", "label": 0},
        {"text": "c", "text_pair": "", "label": "sad"},
        {"text": "a b c d e f g h", "label": "glad"},
    )
    config = data_config(own, validation={"v": own}, max_length=6)
    data = load_validation_data(config, word_tokenizer, 5, classification=MOODS)["v"]
    (batch,) = data
    assert rows_of(batch) == [  # sorted by length
        ([1, 5], [1], [0.0]),
        ([1, 3, 4], [2], [1.0]),
        ([1, 3, 4, 5, 6, 7], [5], [0.0]),  # a break between the two is white space here
        ([1, 3, 4, 5, 6, 7], [5], [1.0]),  # cut at its end
        ([], [], []),
    ]
    assert batch.labels.sum() == 2.0
    assert "4 rows, 1 truncated to 6 tokens" in data.report


def test_ids_equal_the_tokenizers(metaspace_tokenizer):
    found = encode_texts([("The fox", ""), ("The fox", "Paris")], metaspace_tokenizer)
    assert found == metaspace_tokenizer(["The fox", "The fox\nParis"])["input_ids"]


def test_columns_and_numbers(source, data_config, word_tokenizer):
    rows = [{"one": "a", "two": "b", "score": 2.5}, {"one": "a", "two": "c", "score": -1}]
    own = source(*rows, columns={"text": "one", "text_pair": "two", "label": "score"})
    config = data_config(own, validation={"v": own})
    (batch,) = load_validation_data(config, word_tokenizer, 2, classification=NUMBER)["v"]
    assert rows_of(batch) == [([1, 3, 4], [2], [2.5]), ([1, 3, 5], [2], [-1.0])]


def test_other_labels_change_the_digest_and_the_cache(source, data_config, word_tokenizer):
    """Runs with other labels do not resume, and adapters with other labels do not share rows."""
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    token_cache, digests = {}, []
    for some in (rows, rows[::-1]):
        config = data_config(source(*some))
        data = load_train_data(config, word_tokenizer, 2, 0, classification=MOODS)
        digests.append(data.fingerprint["train/only"])
    names = source({"text": "a", "label": "sad"}, {"text": "b", "label": "glad"})
    for labels in (MOODS, ClassificationConfig(labels=("glad", "sad"))):
        config = data_config(names)
        data = load_train_data(
            config, word_tokenizer, 2, 0, token_cache=token_cache, classification=labels
        )
        digests.append(data.fingerprint["train/only"])
    assert digests[2] == digests[0], "names and indices say the same"
    assert len(set(digests)) == 3
    assert len(token_cache) == 2


@pytest.mark.parametrize(
    ("value", "labels", "number"),
    [
        ("glad", MOODS.labels, 1),
        (1, MOODS.labels, 1),
        (1, ("1", "2"), 0),  # the name, not the index
        ("2", ("1", "2"), 1),
        (0, ("1", "2"), None),
        (2, MOODS.labels, None),
        (-1, MOODS.labels, None),
        (1.0, MOODS.labels, None),
        (True, MOODS.labels, None),
        ("1", MOODS.labels, 1),  # as in a CSV file, whose cells are text
        ("1", ("1", "2"), 0),
        ("2", MOODS.labels, None),
        ("-1", MOODS.labels, None),
    ],
)
def test_labels(value, labels, number):
    classification = ClassificationConfig(labels=labels)
    if number is not None:
        assert label_number(value, classification, "here") == number
        return
    with pytest.raises(DataError, match=r"^here is .*not one of the labels \("):
        label_number(value, classification, "here")


def test_numbers_of_a_table_are_text():
    assert label_number("-2.5", NUMBER, "here") == -2.5


@pytest.mark.parametrize(
    ("row", "classification", "words"),
    [
        ({"text": "a"}, MOODS, "line 2: no column 'label' (it has: text)"),
        ({"text": 5, "label": 1}, MOODS, "line 2: column 'text' must be text, got int (5)"),
        ({"text": "a", "label": "gald"}, MOODS, 'line 2: the label is "gald", which is not one of'),
        ({"text": "a", "label": -1}, MOODS, "use a split whose answers are public"),
        ({"text": "a", "label": None}, MOODS, "line 2: column 'label' must be a label's name"),
        ({"text": "a", "label": "three"}, NUMBER, "line 2: the label must be a finite number"),
        ({"text": "a", "label": "inf"}, NUMBER, "line 2: the label must be a finite number"),
        ({"text": "a", "label": float("nan")}, NUMBER, "must be a finite number, got NaN"),
    ],
)
def test_rows_that_do_not_fit_are_named(
    source, data_config, word_tokenizer, row, classification, words
):
    own = source({"text": "a", "label": 0}, row)
    with pytest.raises(DataError) as error:
        load_train_data(data_config(own), word_tokenizer, 2, 0, classification=classification)
    assert f"{own.path}: " in str(error.value)
    assert words in str(error.value)
