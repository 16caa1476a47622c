"""Bodies that are refused, each with the field at fault."""

import json

import pytest

from moe_jax.serving.fields import ApiError
from moe_jax.serving.protocol import parse_body, parse_chat, parse_completion

COMPLETION = {"model": "m", "prompt": "a"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
FUNCTION = {"name": "look_up", "arguments": "{}"}
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": FUNCTION}]}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": None}, "model", "must be the name of a model"),
        ({"model": 3}, "model", "must be the name"),
        ({"prompt": None}, "prompt", "must be a string, token ids, or a list"),
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string"),
        ({"prompt": [True]}, "prompt", "must be a string"),
        ({"prompt": ["a"] * 257}, "prompt", "at most 256 prompts are possible, got 257"),
        ({"max_tokens": 0}, "max_tokens", "0 asks for no token"),
        ({"max_tokens": -1}, "max_tokens", "must be at least 0, got -1"),
        ({"max_tokens": 1.5}, "max_tokens", "must be a whole number, got the number 1.5"),
        ({"max_tokens": True}, "max_tokens", "must be a whole number, got a boolean"),
        ({"temperature": 2.1}, "temperature", "must be between 0 and 2, got 2.1"),
        ({"temperature": float("nan")}, "temperature", "must be between 0 and 2, got nan"),
        ({"temperature": 10**400}, "temperature", "got a number of more than 15 digits"),
        ({"temperature": "1"}, "temperature", "must be a number, got a string"),
        ({"top_p": 0}, "top_p", "must be between 1e-06 and 1, got 0"),
        ({"n": 17}, "n", "must be between 1 and 16, got 17"),
        ({"n": 0}, "n", "must be between 1 and 16, got 0"),
        ({"seed": 2**64}, "seed", "must be between -9223372036854775808 and 18446744073709551615"),
        ({"stop": ["a", ""]}, "stop", "a string is empty"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 strings are possible, got 17"),
        ({"stop": "a" * 257}, "stop", "longer than 256 characters"),
        ({"stop": [3]}, "stop", "must be a string or a list of strings"),
        ({"logprobs": 21}, "logprobs", "must be between 0 and 20"),
        ({"stream": "yes"}, "stream", "must be true or false, got a string"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set `stream` too"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "is not supported"),
        ({"moe_jax": {"routes": True}}, "moe_jax.routes", "is not supported"),
        ({"logit_bias": {"3": 1}}, "logit_bias", "is not supported; leave it out"),
        ({"best_of": 2}, "best_of", "is not supported"),
        ({"suffix": "b"}, "suffix", "is not supported"),
        ({"presence_penalty": -3}, "presence_penalty", "must be between -2 and 2, got -3"),
        ({"temprature": 1}, "temprature", "is unknown; leave it out"),
    ],
)
def test_completions(change, param, message):
    with pytest.raises(ApiError) as refused:
        parse_completion({**COMPLETION, **change})
    assert refused.value.status == 400
    assert refused.value.param == param
    assert message in refused.value.message
    assert refused.value.to_object()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "must be a list of at least one message"),
        ({"messages": "a"}, "messages", "must be a list of at least one message"),
        ({"messages": ["a"]}, "messages[0]", "must be an object"),
        ({"messages": [{"role": "x", "content": ""}]}, "messages[0].role", "must be one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "only parts of type 'text'",
        ),
        ({"messages": [*CHAT["messages"], CALL]}, "messages", "end with the assistant's turn"),
        (
            {"messages": [{"role": "user", "content": "a", "prefix": True}]},
            "messages[0].prefix",
            "is not supported",
        ),
        ({"messages": [{**CALL, "role": "user"}]}, "messages[0].tool_calls", "is not supported"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0]",
            "must be of type 'function'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [TOOL]}]},
            "messages[0].tool_calls",
            "a function has no `arguments`",
        ),
        ({"tools": [TOOL, {}]}, "tools[1]", "must be of type 'function'"),
        ({"tools": [{**TOOL, "type": "search"}]}, "tools[0]", "must be of type 'function'"),
        ({"tools": {}}, "tools", "must be a list of objects"),
        ({"tool_choice": "required"}, "tool_choice", "only 'auto' and 'none'"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs: true`"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"functions": []}, "functions", "is not supported"),
        ({"prompt": "a"}, "prompt", "is unknown"),
    ],
)
def test_conversations(change, param, message):
    with pytest.raises(ApiError) as refused:
        parse_chat({**CHAT, **change})
    assert (refused.value.status, refused.value.param) == (400, param)
    assert message in refused.value.message


def test_what_asks_for_nothing_is_accepted():
    neutral = {"logit_bias": {}, "best_of": 1, "suffix": None, "user": "me", "stop": None}
    parsed = parse_completion({**COMPLETION, **neutral, "top_k": -1, "n": None})
    assert (parsed.n, parsed.top_k, parsed.stop, parsed.temperature) == (1, None, (), 1.0)
    assert parse_completion({**COMPLETION, "prompt": [[1, 2], [3]]}).prompts == ((1, 2), (3,))
    assert parse_completion({**COMPLETION, "seed": -1}).seed == 2**32 - 1
    echoed = {"role": "assistant", "content": "b", "audio": None, "annotations": []}
    assert parse_chat({**CHAT, "messages": [echoed, *CHAT["messages"]]}).messages[0] == {
        "role": "assistant",
        "content": "b",
    }
    neutral = {"response_format": {"type": "text"}, "tool_choice": "auto", "store": False}
    chat = parse_chat({**CHAT, **neutral, "max_tokens": 3, "max_completion_tokens": 5})
    assert (chat.max_tokens, chat.tools, chat.logprobs) == (5, None, None)
    assert parse_chat({**CHAT, "tools": [TOOL], "tool_choice": "none"}).tools is None
    developer = parse_chat(
        {**CHAT, "messages": [{"role": "developer", "content": "x"}, CALL, *CHAT["messages"]]}
    )
    assert [message["role"] for message in developer.messages] == ["system", "assistant", "user"]
    assert developer.messages[1] == CALL


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[]", "must be a JSON object, got a list"),
        (b"[" * 5000 + b"]" * 5000, "nested deeper"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
)
def test_bodies_that_are_no_object(body, message):
    with pytest.raises(ApiError, match=message):
        parse_body(body)
    assert parse_body(json.dumps(COMPLETION).encode()) == COMPLETION
