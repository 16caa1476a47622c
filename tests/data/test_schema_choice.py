"""The schema that the columns of the first row tell."""

import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.data.schema_choice import COLUMN_SCHEMAS, TEXT_SCHEMAS, choose_schema
from moe_jax.errors import DataError


def choose(columns, schemas=COLUMN_SCHEMAS, **named):
    source = SourceConfig(path="x.jsonl", columns=named)
    return choose_schema(source, columns.split(), "x.jsonl: line 1", schemas)


@pytest.mark.parametrize(
    ("columns", "named", "schema", "expected"),
    [
        ("instruction output", {}, "instruction", {}),
        ("id input output instruction", {}, "instruction", {}),
        ("prompt completion", {}, "completion", {}),
        ("prompt prompt_id messages", {}, "chat", {}),
        ("id conversations", {}, "chat", {"messages": "conversations"}),
        ("messages conversations", {}, "chat", {}),
        ("text url", {}, "text", {}),
        ("question answer", {"prompt": "question", "completion": "answer"}, "completion", None),
        ("q output", {"instruction": "q"}, "instruction", None),
        ("body", {"text": "body"}, "text", None),
        ("talk", {"messages": "talk"}, "chat", None),
        ("a b label", {"text": "a", "text_pair": "b"}, "classification", None),
    ],
)
def test_the_only_schema_that_fits(columns, named, schema, expected):
    chosen = choose(columns, **named)
    assert chosen.schema == schema
    assert chosen.columns == (named if expected is None else expected)


def test_labels_are_left_out_where_they_cannot_be_used():
    assert choose("text label", TEXT_SCHEMAS).schema == "text"
    assert choose("text label", ("classification",)).schema == "classification"


@pytest.mark.parametrize(
    ("columns", "named", "words"),
    [
        ("text label", {}, "fit the schemas 'text' and 'classification'; set `schema`"),
        ("instruction output text", {}, "fit the schemas 'instruction' and 'text'; set"),
        (
            "question answer",
            {},
            "question, answer fit no schema (instruction: instruction, output;",
        ),
        ("", {}, "the columns (none) fit no schema"),
    ],
)
def test_columns_that_do_not_tell(columns, named, words):
    with pytest.raises(DataError) as caught:
        choose(columns, **named)
    message = str(caught.value)
    assert message.startswith("x.jsonl: line 1: the columns ") and words in message
    assert "`columns`" in message and "--column FIELD=NAME" in message
    assert "\n" not in message


def test_labels_of_completions_are_not_left_out_in_silence():
    with pytest.raises(
        DataError, match="fit the schema 'completion', which learns all completions"
    ):
        choose("prompt completion label")
    assert choose("prompt completion label", ("feedback",)).schema == "feedback"
    assert choose("prompt completion id").schema == "completion"


@pytest.mark.parametrize(
    ("columns", "schema", "losses"),
    [
        ("chosen rejected", "preference", "dpo, orpo or simpo"),
        ("prompt chosen rejected id", "preference", "dpo, orpo or simpo"),
        ("prompt completion label", "feedback", "kto"),
    ],
)
def test_columns_of_preference_data(columns, schema, losses):
    assert choose(columns, (schema,)).schema == schema
    other = ("feedback",) if schema == "preference" else ("preference",)
    for schemas in (("instruction",), other):
        with pytest.raises(DataError) as caught:
            choose(columns, schemas)
        message = str(caught.value)
        assert f"are those of the schema '{schema}'" in message
        assert f"with the preference loss {losses}, given by" in message
        assert ("as two rows with prompt, completion and label" in message) == (
            schemas == ("feedback",)
        )


@pytest.mark.parametrize("field", ["prompt", "input"])
def test_a_named_column_that_is_missing(field):
    message = rf"do not include 'nosuch', which `columns` \(--column {field}=nosuch\) names"
    with pytest.raises(DataError, match=message):
        choose("instruction output", **{field: "nosuch"})


@pytest.mark.parametrize(
    ("columns", "field", "hint"),
    [("prompt completion q", "promt", "prompt"), ("text", "txt", "text")],
)
def test_a_named_field_that_no_schema_has(columns, field, hint):
    words = rf"\(--column {field}=q\): no schema has a field '{field}'; did you mean '{hint}'\?"
    with pytest.raises(DataError, match=words):
        choose(columns, **{field: "q"})
