"""Data sets as tokenized rows, and the texts of tokens."""

import json

import pytest
from inspection.conftest import BASE

from moe_jax.config.data import SourceConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import DataError
from moe_jax.inspection.token_rows import read_token_rows, token_texts
from moe_jax.tasks.selection import named_task


def test_a_task_is_its_questions_with_the_right_label(tmp_path):
    folder = tmp_path / "boolq"
    folder.mkdir()
    rows = [
        {"question": f"is {n} a cat", "passage": "a cat is red .", "answer": n == 1}
        for n in range(3)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "validation.jsonl").write_text(text)
    task, tokenizer = named_task("boolq", data=tmp_path), load_tokenizer(BASE)
    result = read_token_rows({"boolq": task}, tokenizer, limit=2, max_length=200)
    assert len(result.rows) == 2 and result.report[0].startswith("boolq: 2 rows, ")
    ends = [tokenizer.decode(row.tokens[1:-1]).split()[-1] for row in result.rows]
    assert ends == ["false", "true"]
    assert result.rows[0].where == "validation.jsonl: line 1"


def test_rows_without_text_are_rejected(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": "b"}\n')
    source = SourceConfig(path=str(file), schema="classification")
    with pytest.raises(DataError, match="hold no text to tokenize"):
        read_token_rows({"x": source}, load_tokenizer(BASE), limit=2, max_length=200)


@pytest.mark.parametrize(
    "text", ["a cat\n\n the  dog\t.", "caf\u00e9 \U0001f600 \u4e2d!", "\u4e2d"]
)
def test_joined_token_texts_are_the_decoded_text(text):
    tokenizer = load_tokenizer(BASE)
    tokens = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == tokenizer.decode(tokens)
