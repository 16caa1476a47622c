"""Checks of single values of a row."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from moe_jax import terminal
from moe_jax.errors import DataError
from moe_jax.files.json_file import parse_json


def describe_value(value: Any) -> str:
    """Type and beginning of a value of a row, for messages."""
    return "null" if value is None else terminal.describe_value(value)


def check_text(value: Any, where: str) -> str:
    """Returns `value`, which must be text.

    Args:
      value: value as read from the row.
      where: file, row and column, for messages.

    Raises:
      DataError: the value is not text, or not Unicode.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, got {describe_value(value)}")
    _check_unicode(value, where)
    return value


def parse_value(value: Any, kind: type | tuple[type, ...], expected: str, where: str) -> Any:
    """Returns `value`, or the value that it holds as JSON text.

    Args:
      value: value as read from the row.
      kind: type or types that it must have.
      expected: name of the type, for messages.
      where: file, row and column, for messages.

    Raises:
      DataError: the value has another type, or holds what JSON cannot.
    """
    parsed = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            parsed = parse_json(value)
    if not isinstance(parsed, kind):
        raise DataError(f"{where} must be {expected}, got {describe_value(value)}")
    try:
        text = json.dumps(parsed, ensure_ascii=False)
    except TypeError as error:
        raise DataError(f"{where} holds a value that JSON has no form for ({error})") from None
    _check_unicode(text, where)
    return parsed


def without_filled_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the null values of the objects in its columns.

    Arrow gives every object of a column the keys of all others, with null. A null of the data
    itself cannot be told from those; stored as JSON text it is kept.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds an unpaired surrogate, which is not a character") from None
