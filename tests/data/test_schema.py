"""A row that does not fit its schema is refused with its line and column."""

import json

import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.data.schema import check_row, column_names
from moe_jax.errors import DataError


def check(row, schema, **fields):
    return check_row(row, SourceConfig(path="x.json", schema=schema, **fields), "x.json: row 7")


def test_only_the_fields_of_the_schema_are_kept_under_their_own_names():
    row = {"question": "q", "completion": "c", "id": 3}
    assert check(row, "completion", columns={"prompt": "question"}) == {
        "prompt": "q",
        "completion": "c",
    }
    assert check({"text": ""}, "text") == {"text": ""}


@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}])
def test_input_may_be_left_out(row):
    row = {"instruction": "i", "output": "o", **row}
    assert check(row, "instruction") == {"instruction": "i", "input": "", "output": "o"}


def test_input_named_in_columns_is_required():
    with pytest.raises(DataError, match=r"x\.json: row 7: no column 'context'"):
        check({"instruction": "i", "output": "o"}, "instruction", columns={"input": "context"})


def test_messages_keep_their_keys():
    messages = [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "", "thinking": "hm"},
    ]
    assert json.loads(check({"messages": messages}, "chat")["messages"]) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "thinking": "hm"},
    ]


USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    ("schema", "row", "message"),
    [
        ("completion", {"prompt": "p"}, "no column 'completion' (it has: prompt)"),
        ("completion", {"prompt": "p", "completion": 3}, "'completion' must be text, got int (3)"),
        ("completion", {"prompt": "p", "completion": None}, "must be text, got null"),
        ("instruction", {"instruction": "i", "input": ["x"], "output": ""}, "'input' must be text"),
        ("text", ["text"], "a row must be an object with named columns, got list"),
        ("text", {"text": "\ud800"}, "an unpaired surrogate"),
        ("chat", {"messages": "hi"}, "'messages' must be a list of messages, got str"),
        ("chat", {"messages": []}, "no message of the role 'assistant'"),
        ("chat", {"messages": [USER]}, "'assistant' to learn from (roles: user)"),
        (
            "completion",
            {"prompt": [USER], "completion": [ANSWER]},
            "'prompt' must be text, got a list of objects; the schema 'chat' reads messages",
        ),
        ("chat", {"messages": [ANSWER]}, "begins with the assistant"),
        ("chat", {"messages": [USER, "ho"]}, "message 2 must be an object with role"),
        ("chat", {"messages": [{"content": "x"}]}, "message 1 has no 'role' (it has: content)"),
        ("chat", {"messages": [{**USER, "content": None}, ANSWER]}, "message 1, 'content' must be"),
    ],
)
def test_refusals_name_row_and_column(schema, row, message):
    with pytest.raises(DataError) as caught:
        check(row, schema)
    assert message in str(caught.value)
    assert str(caught.value).startswith("x.json: row 7: ")
    assert "\n" not in str(caught.value)


def test_column_names_of_unknown_fields_are_refused_with_the_nearest_one():
    source = SourceConfig(path="x.json", schema="completion", columns={"promt": "q"})
    with pytest.raises(DataError, match=r"columns\.promt is no field .* did you mean 'prompt'"):
        column_names(source)
