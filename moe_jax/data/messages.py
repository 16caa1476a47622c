"""Conversations as people store them, checked and brought to one form.

The form is that of OpenAI's interface and of transformers' chat templates: messages with role and
content, tool calls whose arguments are an object, tools as JSON schemas. ShareGPT's turns get its
roles, JSON text is parsed, and parts of text are joined. A field that changes what is learned is
applied or refused by name. All other keys of a message go to the chat template.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.data.values import check_text, describe_value, parse_value
from moe_jax.errors import DataError

UNTRAINED = "weight"
"""Key of a checked message, with the value 0: an answer that is not learned."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""Roles by ShareGPT's `from`."""

_ONLY_TEXT = "only text is learned, so leave such rows out"
_REFUSED_KEYS = {
    "function_call": "write it as 'tool_calls', [{type, function: {name, arguments}}]",
    "train_detail": "parts of a message cannot be chosen; give 'train' for the whole message",
    "refusal": "write it as 'content'",
    **dict.fromkeys(("image", "images", "audio", "video", "videos"), _ONLY_TEXT),
}
_REFUSED_COLUMNS = {
    "functions": "name it in `columns.tools`",
    **dict.fromkeys(("images", "videos", "audios"), f"{_ONLY_TEXT}, or the column"),
}


def check_chat_columns(row: Mapping[str, Any], used: set[str], where: str) -> None:
    """Refuses columns beside a conversation that change it, and that are not used.

    Raises:
      DataError: such a column is not empty.
    """
    for column, advice in _REFUSED_COLUMNS.items():
        if column not in used and row.get(column):
            raise DataError(f"{where}: column {column!r} would be lost; {advice}")


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Checks a conversation.

    Args:
      value: list of messages, or its JSON text; OpenAI's or ShareGPT's.
      where: file, row and column, for messages.

    Returns:
      See `check_turns`.

    Raises:
      DataError: a message has a wrong form, or there is no answer.
    """
    messages = check_turns(value, where)
    require_answer(messages, where)
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{where} begins with the assistant, which then has nothing to answer; begin with the "
            "user's message"
        )
    return messages


def check_turns(value: Any, where: str) -> list[dict[str, Any]]:
    """Checks messages that may be a part of a conversation.

    Args:
      value: list of messages, or its JSON text; OpenAI's or ShareGPT's.
      where: file, row and column, for messages.

    Returns:
      Messages with `role`, `content` (unless null beside `tool_calls`), the other keys of the row,
      and `UNTRAINED` where an answer is not to be learned.

    Raises:
      DataError: a message has a wrong form.
    """
    messages = parse_value(value, list, "a list of messages", where)
    return [
        _check_message(message, f"{where}, message {number}")
        for number, message in enumerate(messages, start=1)
    ]


def require_answer(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises `DataError` if no message is the assistant's."""
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
        raise DataError(
            f"{where} holds no message of the role 'assistant' to learn from (roles: {roles}); add "
            "the answer, or leave the row out"
        )


def _check_message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where} must be an object with role and content, got {describe_value(value)}"
        )
    message = {key: item for key, item in value.items() if item is not None or key == "content"}
    if "role" not in message and "from" in message:
        message = _converted_from_sharegpt(message, where)
    if "role" not in message:
        raise _missing("role", message, where)
    check_text(message["role"], f"{where}, 'role'")
    for key, advice in _REFUSED_KEYS.items():
        if message.get(key):
            raise DataError(f"{where}: {key!r} would be lost; {advice}")
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _check_tool_calls(calls, where)
    if message.get("content") is None and calls and message["role"] == "assistant":
        message.pop("content", None)
    elif "content" not in message:
        raise _missing("content", message, where)
    else:
        message["content"] = _check_content(message["content"], f"{where}, 'content'")
    if not _is_learned(message, where):
        message[UNTRAINED] = 0
    return message


def _missing(key: str, message: Mapping[str, Any], where: str) -> DataError:
    found = ", ".join(map(str, message)) or "none"
    return DataError(f"{where} has no {key!r} (it has: {found}); add it, or leave the row out")


def _converted_from_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message in OpenAI's form, from one with `from` and `value`."""
    sender = message.pop("from")
    if not isinstance(sender, str) or sender not in SHAREGPT_ROLES:
        raise DataError(
            f"{where}, 'from': unknown sender {sender!r}; known: {', '.join(SHAREGPT_ROLES)}"
        )
    if "value" not in message:
        raise _missing("value", {"from": sender, **message}, where)
    value = message.pop("value")
    if sender == "function_call":
        expected = "a call {name, arguments} as JSON text, or a list of them"
        calls = parse_value(value, (dict, list), expected, f"{where}, 'value'")
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "tool_calls": calls, **message}
    content = _check_content(value, f"{where}, 'value'")
    return {"role": SHAREGPT_ROLES[sender], "content": content, **message}


def _check_content(value: Any, where: str) -> str:
    """Content as text; the texts of a list of parts are joined, as by templates that take parts."""
    if not isinstance(value, list):
        return check_text(value, where)
    texts = []
    for number, part in enumerate(value, 1):
        if not isinstance(part, Mapping):
            raise DataError(f"{where}: part {number} must be an object, got {describe_value(part)}")
        if part.get("type") != "text":
            raise DataError(
                f"{where}: part {number} is of the type {part.get('type')!r}; {_ONLY_TEXT}"
            )
        texts.append(check_text(part.get("text"), f"{where}: the text of part {number}"))
    return "".join(texts)


def _check_tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in transformers' form, whose arguments are an object."""
    calls = []
    listed = parse_value(value, list, "a list of tool calls", f"{where}, 'tool_calls'")
    for number, item in enumerate(listed, 1):
        place = f"{where}, tool call {number}"
        call = _function_form(dict(parse_value(item, dict, "an object", place)))
        function = _named_function(call, place)
        function["arguments"] = parse_value(
            function.get("arguments") or {},
            dict,
            "an object, or JSON text of one",
            f"{place}, 'arguments'",
        )
        calls.append({**call, "function": function})
    return calls


def _function_form(described: dict[str, Any]) -> dict[str, Any]:
    """`{type, function: {name, ...}}` for a tool or call that is stored as `{name, ...}`."""
    if "function" in described or "name" not in described:
        return described
    outer = {key: described.pop(key) for key in ("id", "type") if key in described}
    return {"type": "function", **outer, "function": described}


def _named_function(described: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = described.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} must be {{type, function: {{name, ...}}}}")
    return dict(function)


def _is_learned(message: dict[str, Any], where: str) -> bool:
    """Removes `weight`, `train` and `training`; false if they exclude the message."""
    flags = {}
    for key in ("weight", "train", "training"):
        if key not in message:
            continue
        value = message.pop(key)
        is_number = key == "weight"
        if isinstance(value, bool) is is_number or value not in (0, 1):
            expected = "0 or 1" if is_number else "true or false"
            raise DataError(f"{where}, {key!r} must be {expected}, got {describe_value(value)}")
        flags[key] = bool(value)
    if len(set(flags.values())) > 1:
        raise DataError(f"{where}: {' and '.join(map(repr, flags))} contradict each other")
    if message["role"] != "assistant" and any(flags.values()):
        raise DataError(
            f"{where}: {next(iter(flags))!r} asks to learn a message of the role "
            f"{message['role']!r}; only the assistant's are learned, so leave it out here, or set "
            "data.train_on_prompt to learn all messages"
        )
    return message["role"] != "assistant" or all(flags.values())


def check_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Checks the tools of a conversation: a list of JSON schemas, or its JSON text.

    Raises:
      DataError: the value is no such list.
    """
    tools = []
    for number, item in enumerate(parse_value(value, list, "a list of tools", where), 1):
        place = f"{where}, tool {number}"
        tool = dict(parse_value(item, dict, "an object, the tool's JSON schema", place))
        tools.append(_function_form(tool))
        if tools[-1].get("type", "function") == "function":
            _named_function(tools[-1], place)
    return tools


def check_documents(value: Any, where: str) -> list[dict[str, Any]]:
    """Checks the documents of a conversation: a list of objects, or its JSON text.

    Raises:
      DataError: the value is no such list.
    """
    expected = "an object with title and text"
    return [
        parse_value(item, dict, expected, f"{where}, document {number}")
        for number, item in enumerate(parse_value(value, list, "a list of documents", where), 1)
    ]


def check_template_arguments(value: Any, where: str) -> dict[str, Any]:
    """Checks further variables of the chat template: an object, or its JSON text.

    Raises:
      DataError: the value is no object, or has a key with a meaning of its own.
    """
    arguments = parse_value(value, dict, "an object of the template's variables", where)
    from transformers import PreTrainedTokenizerBase  # late, since --help lists the tasks

    reserved = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
    for key in arguments:
        if key in {*reserved, "messages", "strftime_now"}:
            raise DataError(f"{where}: {key!r} cannot be set here; leave it out")
    return arguments
