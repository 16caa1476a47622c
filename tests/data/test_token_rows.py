"""Token rows to measure on, against ids by hand: <s> is 1, </s> is 2, a is 3, b is 4, ..."""

from pathlib import Path

import pytest

from moe_jax.data.token_rows import load_token_rows
from moe_jax.errors import DataError


def test_texts_follow_one_another(write, word_tokenizer):
    file = Path(write("a.txt", "a b\n\nc d e\n"))
    rows = load_token_rows(file, word_tokenizer, length=3)
    assert rows.tolist() == [[1, 3, 4], [1, 5, 6]]
    assert load_token_rows(file, word_tokenizer, length=3, max_rows=1).tolist() == [[1, 3, 4]]
    assert load_token_rows(file, word_tokenizer).tolist() == [[1, 3, 4, 1, 5, 6, 7]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text,label\na b,x\n", [1, 3, 4]),
        ("b.jsonl", [{"prompt": "a", "completion": "b", "text": "c"}], [1, 5]),
        ("c.json", [{"prompt": "a", "completion": "b"}], [1, 3, 4, 2]),
    ],
)
def test_rows_of_any_schema(write, word_tokenizer, name, content, expected):
    file = Path(write(name, content))
    assert load_token_rows(file, word_tokenizer).tolist() == [expected]
    assert load_token_rows(file.with_name("*" + file.suffix), word_tokenizer).tolist() == [expected]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xml", "a", "a.xml: unknown kind of file"),
        ("a.csv", "q,a\nb,c\n", "a.csv: line 2: the columns q, a fit no schema"),
        (
            "a.csv",
            "q,a\nb,c\n",
            "give a file with a column 'text', or with the columns of exactly one",
        ),
        ("a.jsonl", [{"text": None}], "a.jsonl: line 1: column 'text' must be text, got null"),
        ("a.txt", "", "a.txt: holds no rows"),
        ("a.jsonl", [{"text": ""}], "a.jsonl: holds no text"),
    ],
)
def test_data_without_text(write, word_tokenizer, name, content, words):
    with pytest.raises(DataError) as caught:
        load_token_rows(Path(write(name, content)), word_tokenizer)
    assert words in str(caught.value)
