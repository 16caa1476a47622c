"""The fields of a body, taken one by one, and errors in the form of OpenAI's API.

Every field of a body is either honored or refused by name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Fields of OpenAI's API whose only accepted values are those that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "suffix": ("",),
    "best_of": (1,),
    "functions": (),
    "function_call": (),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Labels of the caller, which ask for nothing."""


class ApiError(Exception):
    """A request that is answered with OpenAI's error object.

    Attributes:
      status: HTTP status.
      message: reason and remedy.
      param: field at fault.
      code: OpenAI's code, or None.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_object(self) -> dict[str, Any]:
        """The body of the response."""
        return error_object(self.status, self.message, self.param, self.code)


def error_object(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class FieldReader:
    """Takes the fields of a body one by one, and refuses those that are left."""

    def __init__(self, fields: Mapping[str, Any]):
        """Starts with all fields; one that is null counts as left out."""
        self._left = {name: value for name, value in fields.items() if value is not None}

    def fail(self, name: str, reason: str) -> Any:
        """Raises the error for a field."""
        raise ApiError(400, f"{name}: {reason}", param=name)

    def take(self, name: str) -> Any:
        """The value of a field; None if it is absent."""
        return self._left.pop(name, None)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            return self.fail(name, f"must be a number, got {kind_of(value)}")
        if not low <= value <= high:
            return self.fail(name, f"must be between {low:g} and {high:g}, got {_shown(value)}")
        return float(value)

    def optional_integer(self, name: str, low: int, high: int | None) -> int | None:
        """A whole number from `low` to `high`; None if it is absent."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            return self.fail(name, f"must be a whole number, got {kind_of(value)}")
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            return self.fail(name, f"must be {bounds}, got {_shown(value)}")
        return value

    def boolean(self, name: str) -> bool:
        """True or false; false if it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            return self.fail(name, f"must be true or false, got {kind_of(value)}")
        return bool(value)

    def object(self, name: str, known: Sequence[str]) -> dict[str, Any]:
        """An object with some of the fields `known`; empty if it is absent."""
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            return self.fail(name, f"must be an object, got {kind_of(value)}")
        for field in value:
            if field not in known:
                return self.fail(f"{name}.{field:.80}", "is not supported")
        return value

    def finish(self) -> None:
        """Refuses the fields that are left."""
        for name, value in self._left.items():
            if name in _IGNORED or value in _NEUTRAL.get(name, ()):
                continue
            known = "is not supported" if name in _NEUTRAL else "is unknown"
            self.fail(name[:80], f"{known}; leave it out")


def is_list_of(value: Any, kind: type) -> bool:
    """True for a list of values of this type."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def kind_of(value: Any) -> str:
    """Kind of a JSON value, for messages."""
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    if value is None:
        return "null"
    return names[type(value)] if type(value) in names else f"the number {_shown(value)}"


def _shown(value: float) -> str:
    """A number, shortened; JSON's numbers may have hundreds of digits."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return f"{value}" if abs(value) < 10**15 else "a number of more than 15 digits"
