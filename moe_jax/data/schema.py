"""Fields of each schema, and checks of rows and labels against them.

Every row is checked here before any other module reads it. A checked row holds text only. Chat
messages stay JSON text: Arrow would give every message the keys of all messages, and chat templates
test for the presence of a key.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import Schema, SourceConfig
from moe_jax.config.parse import suggest
from moe_jax.errors import DataError

FIELDS: dict[Schema, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
    "classification": ("text", "text_pair", "label"),
    "task": ("prompt", "completion"),
}
# May be missing from a row (an instruction without input, a single text), unless `columns` names
# the column.
OPTIONAL = ("input", "text_pair")


def column_names(source: SourceConfig) -> dict[str, str]:
    """Column name of each field of the source's schema.

    Raises:
      DataError: a key of `columns` is not a field of the schema.
    """
    fields = FIELDS[source.schema]
    for field in source.columns:
        if field not in fields:
            raise DataError(
                f"{source.path}: columns.{field} is no field of the schema {source.schema!r}; "
                f"{suggest(field, fields)}"
            )
    return {field: source.columns.get(field, field) for field in fields}


def check_row(row: Any, source: SourceConfig, where: str) -> dict[str, str]:
    """Fields of the source's schema from `row`, as text.

    Args:
      row: row as read from its file.
      source: data set, with its schema and column names.
      where: file and row, for messages.

    Raises:
      DataError: a column is missing, null or of the wrong type.
    """
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where}: a row must be an object with named columns, got {describe_value(row)}"
        )
    checked = {}
    for field, column in column_names(source).items():
        optional = field in OPTIONAL and field not in source.columns
        if column not in row and not optional:
            raise DataError(
                f"{where}: no column {column!r} (it has: {', '.join(map(str, row)) or 'none'}); "
                f"name the column of the {field} in `columns`, or fix the row"
            )
        value = row.get(column)
        if field == "messages":
            checked[field] = json.dumps(_check_messages(value, f"{where}: column {column!r}"))
        elif field == "label":
            checked[field] = check_label(value, f"{where}: column {column!r}")
        elif value is None and field in OPTIONAL:
            checked[field] = ""
        else:
            checked[field] = _check_text(value, f"{where}: column {column!r}")
    return checked


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, got {describe_value(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds an unpaired surrogate, which is not a character") from None
    return value


def _check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list of messages, got {describe_value(value)}")
    messages = []
    for number, message in enumerate(value, 1):
        position = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise DataError(
                f"{position} must be an object with role and content, got {describe_value(message)}"
            )
        for key in ("role", "content"):
            if key not in message:
                keys = ", ".join(map(str, message)) or "none"
                raise DataError(f"{position} has no {key!r} (it has: {keys})")
            _check_text(message[key], f"{position}, {key!r}")
        # Parquet fills in the keys that other messages have.
        messages.append({key: item for key, item in message.items() if item is not None})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} holds no message of the role 'assistant' to learn from")
    if messages[0]["role"] == "assistant":
        raise DataError(f"{where} begins with the assistant, which then has nothing to answer")
    return messages


def describe_value(value: Any) -> str:
    """Type and beginning of a value, for messages."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} ({text if len(text) <= 40 else text[:37] + '...'})"


def label_number(value: Any, classification: ClassificationConfig, where: str) -> float:
    """Class index of a label, or its number for regression.

    A string is a class name. An integer is a class index from 0, unless class names are numeric:
    then it is a class name too.

    Args:
      value: label as read from the row.
      classification: class names, or regression.
      where: file, row and column, for messages.

    Raises:
      DataError: the label is not a class, or not a finite number for regression.
    """
    if classification.regression:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise DataError(f"{where} must be a finite number, got {json.dumps(value)}")
        return float(value)
    labels = classification.labels
    if isinstance(value, str | int) and not isinstance(value, bool):
        if str(value) in labels:
            return float(labels.index(str(value)))
        numbered = any(label.lstrip("-").isdigit() for label in labels)
        if isinstance(value, int) and not numbered and 0 <= value < len(labels):
            return float(value)
    hint = "; use a split whose answers are public" if value == -1 else ""
    raise DataError(
        f"{where} is {json.dumps(value)}, which is not one of the labels ({', '.join(labels)}) "
        f"nor the index of one{hint}"
    )


def check_label(value: Any, where: str) -> str:
    """A label as JSON text.

    Raises:
      DataError: the label is neither text nor a number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where} must be a label's name, its index or a number, got {value!r}")
    return json.dumps(value)
