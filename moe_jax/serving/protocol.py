"""Bodies of requests into checked settings: the fields of OpenAI's API."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_jax.files.json_file import parse_json
from moe_jax.serving.fields import ApiError, FieldReader, is_list_of, kind_of
from moe_jax.serving.row_sampling import TOP_LOGPROBS

MAX_PROMPTS = 256
"""Largest number of prompts of a request."""

MAX_ANSWERS = 16
"""Largest `n`."""

MAX_STOPS = 16
"""Largest number of stop strings; OpenAI has 4, and tasks of lm-evaluation-harness more."""

MAX_STOP_LENGTH = 256
"""Largest number of characters of a stop string."""

CHAT_TOKENS = 512
"""Default of `max_tokens` in conversations, where the length has room for them."""

ROLES = ("system", "developer", "user", "assistant", "tool")

_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """Settings that completions and conversations share; see `AnswerRequest`.

    Attributes:
      model: name of the model.
      max_tokens: None where the request leaves it out.
      n: number of answers to each prompt.
      stream: whether the answer is sent while it is generated.
      include_usage: whether the last chunk of a stream has the number of tokens.
      logprobs: number of alternatives for each token; None for no log-probabilities.
      routing: whether the routing of tokens is returned.
    """

    model: str
    max_tokens: int | None
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    routing: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: tuple[str, ...]

    @property
    def num_answers(self) -> int:
        """Number of answers to all prompts."""
        return self.n


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(RequestSettings):
    """Body of `/v1/completions`.

    Attributes:
      prompts: texts, or lists of token ids.
      echo: whether answers begin with their prompts.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool

    @property
    def num_answers(self) -> int:
        """Number of answers to all prompts."""
        return self.n * len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class ChatRequest(RequestSettings):
    """Body of `/v1/chat/completions`.

    Attributes:
      messages: messages for the chat template.
      tools: tools for the chat template; None for none.
    """

    messages: tuple[dict[str, Any], ...]
    tools: list[Any] | None


def parse_body(body: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
      ApiError: it is not a JSON object.
    """
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body must be a JSON object, got {kind_of(fields)}")
    return fields


def parse_completion(fields: Mapping[str, Any]) -> CompletionRequest:
    """Checks the body of `/v1/completions`.

    Raises:
      ApiError: a field is unknown, not supported, of the wrong type or out of range.
    """
    reader = FieldReader(fields)
    prompts = _prompts(reader)
    logprobs = reader.optional_integer("logprobs", 0, TOP_LOGPROBS)
    echo = reader.boolean("echo")
    settings = _settings(reader, logprobs, reader.optional_integer("max_tokens", 0, None))
    if settings["max_tokens"] == 0 and not echo:
        raise ApiError(
            400, "max_tokens: 0 asks for no token; set `echo` to score prompts", param="max_tokens"
        )
    reader.finish()
    return CompletionRequest(prompts=prompts, echo=echo, **settings)


def parse_chat(fields: Mapping[str, Any]) -> ChatRequest:
    """Checks the body of `/v1/chat/completions`.

    Raises:
      ApiError: as in `parse_completion`.
    """
    reader = FieldReader(fields)
    messages = _messages(reader)
    tools = reader.take("tools")
    if tools is not None:
        _functions(reader, tools, "tools")
    choice = reader.take("tool_choice")
    if choice not in (None, "auto", "none"):
        reader.fail("tool_choice", "only 'auto' and 'none' are supported")
    names = ("max_completion_tokens", "max_tokens")
    limits = [reader.optional_integer(name, 1, None) for name in names]
    max_tokens = limits[1] if limits[0] is None else limits[0]
    wants_logprobs = reader.boolean("logprobs")
    top = reader.optional_integer("top_logprobs", 0, TOP_LOGPROBS)
    if top is not None and not wants_logprobs:
        reader.fail("top_logprobs", "needs `logprobs: true`")
    settings = _settings(reader, (top or 0) if wants_logprobs else None, max_tokens)
    reader.finish()
    tools = None if choice == "none" else tools
    return ChatRequest(messages=messages, tools=tools or None, **settings)


def _settings(reader: FieldReader, logprobs: int | None, max_tokens: int | None) -> dict[str, Any]:
    """Fields of `RequestSettings`."""
    model = reader.take("model")
    if not isinstance(model, str):
        reader.fail("model", "must be the name of a model; GET /v1/models lists them")
    stream = reader.boolean("stream")
    options = FieldReader(reader.object("stream_options", ("include_usage", "include_obfuscation")))
    if options.boolean("include_obfuscation"):
        reader.fail("stream_options.include_obfuscation", "is not supported")
    include_usage = options.boolean("include_usage")
    if include_usage and not stream:
        reader.fail("stream_options", "is for streams; set `stream` too")
    extension = FieldReader(reader.object("moe_jax", ("routing",)))
    seed = reader.optional_integer("seed", -(2**63), 2**64 - 1)
    top_k = reader.optional_integer("top_k", -1, 2**31 - 1)
    return {
        "model": model,
        "max_tokens": max_tokens,
        "n": reader.optional_integer("n", 1, MAX_ANSWERS) or 1,
        "stream": stream,
        "include_usage": include_usage,
        "logprobs": logprobs,
        "routing": extension.boolean("routing"),
        "temperature": reader.number("temperature", 1.0, 0.0, 2.0),
        "top_k": top_k if top_k is not None and top_k > 0 else None,  # 0 and -1: no limit, in vLLM
        "top_p": reader.number("top_p", 1.0, 1e-6, 1.0),
        "min_p": reader.number("min_p", 0.0, 0.0, 1.0),
        "repetition_penalty": reader.number("repetition_penalty", 1.0, 0.01, 100.0),
        "presence_penalty": reader.number("presence_penalty", 0.0, -2.0, 2.0),
        "frequency_penalty": reader.number("frequency_penalty", 0.0, -2.0, 2.0),
        "seed": secrets.randbits(32) if seed is None else seed % 2**32,
        "stop": _stops(reader),
    }


def _stops(reader: FieldReader) -> tuple[str, ...]:
    value = reader.take("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not is_list_of(stops, str):
        reader.fail("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        reader.fail("stop", f"at most {MAX_STOPS} strings are possible, got {len(stops)}")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        reader.fail("stop", f"a string is longer than {MAX_STOP_LENGTH} characters")
    if not all(stops):
        reader.fail("stop", "a string is empty")
    return tuple(stops)


def _prompts(reader: FieldReader) -> tuple[str | tuple[int, ...], ...]:
    value = reader.take("prompt")
    if isinstance(value, str):
        return (value,)
    if is_list_of(value, str) and value:
        prompts = tuple(value)
    elif _is_ids(value):
        return (tuple(value),)
    elif isinstance(value, list) and value and all(map(_is_ids, value)):
        prompts = tuple(map(tuple, value))
    else:
        return reader.fail(
            "prompt", "must be a string, token ids, or a list of strings or of token ids"
        )
    if len(prompts) > MAX_PROMPTS:
        reader.fail("prompt", f"at most {MAX_PROMPTS} prompts are possible, got {len(prompts)}")
    return prompts


def _messages(reader: FieldReader) -> tuple[dict[str, Any], ...]:
    value = reader.take("messages")
    if not isinstance(value, list) or not value:
        reader.fail("messages", "must be a list of at least one message")
    messages = []
    for index, message in enumerate(value):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            reader.fail(name, "must be an object with `role` and `content`")
        role = message.get("role")
        if role not in ROLES:
            reader.fail(f"{name}.role", f"must be one of {', '.join(ROLES)}")
        given = {key: part for key, part in message.items() if part not in (None, [], {})}
        for key in given:
            if key not in _MESSAGE_FIELDS or (key == "tool_calls" and role != "assistant"):
                reader.fail(f"{name}.{key:.80}", "is not supported; leave it out")
        for call in _functions(reader, given.get("tool_calls", []), f"{name}.tool_calls"):
            if not isinstance(call["function"].get("arguments"), str | dict):
                reader.fail(f"{name}.tool_calls", "a function has no `arguments`")
        if "content" in given:
            given["content"] = _content(reader, given["content"], f"{name}.content")
        elif not (role == "assistant" and "tool_calls" in given):
            reader.fail(f"{name}.content", "is missing")
        # Chat templates know the newer name of OpenAI's API for system messages by its older one.
        messages.append({**given, "role": "system" if role == "developer" else role})
    if messages[-1]["role"] == "assistant":
        reader.fail("messages", "end with the assistant's turn; end them with the user's")
    return tuple(messages)


def _functions(reader: FieldReader, value: Any, name: str) -> list[dict[str, Any]]:
    """Tools, or calls of them."""
    if not is_list_of(value, dict):
        return reader.fail(name, "must be a list of objects")
    for index, item in enumerate(value):
        function = item.get("function")
        is_named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if item.get("type", "function") != "function" or not is_named:
            reader.fail(f"{name}[{index}]", "must be of type 'function' and name its `function`")
    return value


def _content(reader: FieldReader, content: Any, name: str) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return content
    if not is_list_of(content, dict):
        return reader.fail(name, "must be a string or a list of parts")
    for index, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            return reader.fail(f"{name}[{index}].type", "only parts of type 'text' are supported")
    return "".join(part["text"] for part in content)


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )
