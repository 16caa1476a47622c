"""Conversations in the forms that people store them become one form, or are refused by name."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.data.messages import check_messages, check_tools
from moe_jax.data.readers import read_rows
from moe_jax.data.schema import check_row
from moe_jax.errors import DataError

USER = {"role": "user", "content": "Wet?"}
ANSWER = {"role": "assistant", "content": "Yes."}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Ulm", "day": None}}}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}


def check(row, **fields):
    source = SourceConfig(path="x.json", schema="chat", **fields)
    checked = check_row(row, source, "x.json: row 7")
    return {field: json.loads(text) for field, text in checked.items() if text}


def test_sharegpt_turns_get_the_roles_of_openai():
    turns = [
        {"from": "system", "value": "Short."},
        {"from": "human", "value": "Wet?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "22"},
        {"from": "gpt", "value": "No.", "weight": 0},
        {"from": "user", "value": "Now?"},
        {"from": "assistant", "value": "Yes."},
    ]
    assert check({"conversations": turns}, columns={"messages": "conversations"}) == {
        "messages": [
            {"role": "system", "content": "Short."},
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "22"},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "Now?"},
            ANSWER,
        ]
    }


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [
            {
                "type": "function",
                "function": {**CALL["function"], "arguments": '{"town":"Ulm","day":null}'},
            }
        ],
        [CALL["function"]],
    ],
    ids=["object", "JSON text", "arguments as JSON text", "flat"],
)
def test_tool_calls_get_arguments_as_an_object(calls):
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    (_, checked) = check_messages([USER, message], "x")
    assert checked == {"role": "assistant", "tool_calls": [CALL]}


def test_order_of_keys_is_kept_since_templates_print_it():
    call = {
        "id": "1",
        "function": {"arguments": '{"b": 1, "a": 2}', "name": "f"},
        "type": "function",
    }
    (_, checked) = check_messages([USER, {**ANSWER, "tool_calls": [call]}], "x")
    assert json.dumps(checked["tool_calls"]) == json.dumps([call]).replace(
        json.dumps(call["function"]["arguments"]), call["function"]["arguments"]
    )


@pytest.mark.parametrize("calls", [None, [], ""])
def test_absent_tool_calls_are_left_out(calls):
    assert check_messages([USER, {**ANSWER, "tool_calls": calls}], "x") == [USER, ANSWER]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "We"}, {"type": "text", "text": "t?", "image": None}]
    assert check_messages([{**USER, "content": parts}, ANSWER], "x") == [USER, ANSWER]


@pytest.mark.parametrize(
    ("flags", "is_learned"),
    [
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"weight": 0, "train": False}, False),
        ({"weight": None}, True),
    ],
)
def test_flags_of_an_answer(flags, is_learned):
    (_, checked) = check_messages([{**USER, "train": False, "weight": 0}, {**ANSWER, **flags}], "x")
    assert checked == (ANSWER if is_learned else {**ANSWER, "weight": 0})


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        [{"type": "function", **TOOL["function"]}],
    ],
    ids=["objects", "JSON text", "JSON texts", "flat", "flat with type"],
)
def test_tools_become_json_schemas(tools):
    assert check_tools(tools, "x") == [TOOL]
    row = {"messages": [USER, ANSWER], "functions": tools}
    assert check(row, columns={"tools": "functions"})["tools"] == [TOOL]


@pytest.mark.parametrize("empty", [None, [], "", "[]"])
def test_no_tools(empty):
    assert check({"messages": [USER, ANSWER], "tools": empty}).keys() == {"messages"}


def test_columns_beside_the_messages():
    row = {
        "messages": json.dumps([USER, ANSWER]),
        "system": "Short.",
        "documents": [{"title": "t", "text": "x"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "id": 3,
    }
    checked = check_row(row, SourceConfig(path="x.json", schema="chat"), "x")
    assert checked["system"] == "Short."
    assert json.loads(checked["messages"]) == [USER, ANSWER]
    assert json.loads(checked["documents"]) == row["documents"]
    assert json.loads(checked["chat_template_kwargs"]) == row["chat_template_kwargs"]
    left_out = SourceConfig(path="x.json", schema="chat", columns={"system": "", "documents": ""})
    checked = check_row(row, left_out, "x")
    assert (checked["system"], checked["documents"]) == ("", "")


def refused(*messages, **columns):
    with pytest.raises(DataError) as caught:
        check({"messages": list(messages), **columns})
    message = str(caught.value)
    assert message.startswith("x.json: row 7: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"weight": 0.5}, "message 2, 'weight' must be 0 or 1, got float (0.5)"),
        ({"weight": True}, "message 2, 'weight' must be 0 or 1, got bool (True)"),
        ({"train": 1}, "message 2, 'train' must be true or false, got int (1)"),
        ({"weight": 1, "training": False}, "message 2: 'weight' and 'training' contradict"),
        ({"train_detail": [{}]}, "message 2: 'train_detail' would be lost"),
        ({"function_call": {"name": "f"}}, "'function_call' would be lost; write it as"),
        ({"images": ["a.png"]}, "message 2: 'images' would be lost; only text is learned"),
        ({"content": None}, "message 2, 'content' must be text, got null"),
        ({"content": [{"type": "image_url"}]}, "part 1 is of the type 'image_url'; only text"),
        ({"content": ["a"]}, "'content': part 1 must be an object, got str ('a')"),
        ({"tool_calls": "f(x)"}, "'tool_calls' must be a list of tool calls, got str ('f(x)')"),
        ({"tool_calls": [{"id": "1"}]}, "message 2, tool call 1 must be {type, function: {name"),
        ({"tool_calls": [{"name": "f", "arguments": "x"}]}, "tool call 1, 'arguments' must be an"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}, "an unpaired surrogate"),
    ],
)  # fmt: skip
def test_refusals_name_the_message(message, expected):
    assert expected in refused(USER, {**ANSWER, **message})


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"tools": "rain"}, "column 'tools' must be a list of tools, got str ('rain')"),
        ({"tools": ["rain"]}, "tool 1 must be an object, the tool's JSON schema, got str"),
        ({"tools": [{"type": "function"}]}, "tool 1 must be {type, function: {name"),
        ({"documents": ["x"]}, "document 1 must be an object with title and text, got str ('x')"),
        ({"documents": [{"day": datetime.date(2020, 1, 1)}]}, "that JSON has no form for"),
        ({"chat_template_kwargs": [1]}, "must be an object of the template's variables"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools' cannot be set here"),
        ({"chat_template_kwargs": {"tokenize": True}}, "'tokenize' cannot be set here"),
        ({"functions": [{}]}, "column 'functions' would be lost; name it in `columns.tools`"),
        ({"images": ["a.png"]}, "column 'images' would be lost; only text is learned"),
        ({"system": 3}, "column 'system' must be text, got int (3)"),
    ],
)
def test_refusals_name_the_column(columns, expected):
    assert expected in refused(USER, ANSWER, **columns)


def test_other_refusals():
    assert "message 1: 'train' asks to learn a message of the role 'user'" in refused(
        {**USER, "train": True}, ANSWER
    )
    assert "column 'system' and message 1 are both system messages" in refused(
        {"role": "system", "content": "a"}, USER, ANSWER, system="b"
    )
    assert "message 1, 'from': unknown sender 'bot'; known: human, " in refused(
        {"from": "bot", "value": "x"}, ANSWER
    )
    assert "message 1 has no 'value' (it has: from)" in refused({"from": "human"}, ANSWER)
    assert "message 2, 'value' must be a call {name, arguments} as JSON text" in refused(
        USER, {"from": "function_call", "value": "rain"}
    )
    assert "message 1, 'content' must be text, got null" in refused(
        {**USER, "content": None}, ANSWER
    )


def test_keys_that_parquet_fills_in_are_left_out(tmp_path):
    calls = [{"name": "rain", "arguments": {"town": "Ulm"}}, {"name": "add", "arguments": {"a": 1}}]
    row = {
        "messages": [USER, {"role": "assistant", "tool_calls": calls}, {**ANSWER, "weight": 0}],
        "tools": [TOOL, {"type": "function", "function": {"name": "add", "strict": True}}],
    }
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert pq.read_table(path).to_pylist() != [row]
    assert [read for _, read in read_rows(path)] == [row]
