"""Fields of each schema, and checks of rows and labels against them.

Every row is checked here before any other module reads it. A checked row holds text only. Chat
messages stay JSON text: Arrow would give every message the keys of all messages, and chat templates
test for the presence of a key.
"""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import PREFERENCE_SCHEMAS, Schema, SourceConfig
from moe_jax.config.parse import suggest
from moe_jax.data.messages import (
    check_chat_columns,
    check_documents,
    check_messages,
    check_template_arguments,
    check_tools,
)
from moe_jax.data.preference_answers import (
    check_answer,
    check_feedback_label,
    check_forms,
    normalized_answer,
    normalized_pair,
)
from moe_jax.data.values import check_text, describe_value
from moe_jax.errors import DataError

_CHAT_FIELDS = ("system", "tools", "documents", "chat_template_kwargs")
"""Fields beside messages that go to the chat template."""

FIELDS: dict[Schema, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "chat": ("messages", *_CHAT_FIELDS),
    "text": ("text",),
    "classification": ("text", "text_pair", "label"),
    "preference": ("prompt", "chosen", "rejected", *_CHAT_FIELDS),
    "feedback": ("prompt", "completion", "label", *_CHAT_FIELDS),
    "task": ("prompt", "completion"),
}
_OPTIONAL = ("input", "text_pair", *_CHAT_FIELDS)
# Fields of lists and objects, which a checked row holds as JSON text.
_NESTED: dict[str, Callable[[Any, str], Any]] = {
    "messages": check_messages,
    "tools": check_tools,
    "documents": check_documents,
    "chat_template_kwargs": check_template_arguments,
}


def is_optional(field: str, schema: Schema) -> bool:
    """True if the field may be missing from a row, unless `columns` names its column."""
    return field in _OPTIONAL or (schema == "preference" and field == "prompt")


def column_names(source: SourceConfig) -> dict[str, str]:
    """Column name of each field of the source's schema; empty for a field that is not read.

    Raises:
      DataError: a key of `columns` is not a field of the schema.
    """
    assert source.schema is not None
    fields = FIELDS[source.schema]
    for field in source.columns:
        if field not in fields:
            raise DataError(
                f"{source.title}: columns.{field} is no field of the schema {source.schema!r}; "
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
    assert source.schema is not None
    row = row_columns(row, where)
    names = column_names(source)
    has_answers = source.schema in PREFERENCE_SCHEMAS
    if source.schema == "chat" or has_answers:
        check_chat_columns(row, set(names.values()), where)
    checked, answers = dict[str, str](), dict[str, Any]()
    for field, column in names.items():
        may_miss = is_optional(field, source.schema)
        optional = may_miss and (field not in source.columns or not column)
        if column not in row and not optional:
            raise DataError(
                f"{where}: no column {column!r} (it has: {', '.join(map(str, row)) or 'none'}); "
                f"name the column of the {field} in `columns`, or fix the row"
            )
        value = row.get(column) if column else None
        place = f"{where}: column {column!r}"
        if may_miss and value in (None, "", [], {}) and field != "prompt":
            checked[field] = ""
        elif field in _NESTED:
            nested = _NESTED[field](value, place)
            checked[field] = json.dumps(nested) if nested else ""
        elif field == "label":
            check = check_feedback_label if has_answers else check_label
            checked[field] = check(value, place)
        elif has_answers and field not in _CHAT_FIELDS:
            is_absent = may_miss and value is None
            answers[field] = None if is_absent else check_answer(value, place)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            raise DataError(
                f"{place} must be text, got a list of objects; the schema 'chat' reads messages, "
                "those of prompt and answer in one column"
            )
        else:
            checked[field] = check_text(value, place)
    if has_answers:
        return _with_answers(checked, answers, where)
    if checked.get("system") and json.loads(checked["messages"])[0]["role"] == "system":
        raise DataError(
            f"{where}: column {names['system']!r} and message 1 are both system messages; leave "
            "one out, or set columns.system to '' to read the messages alone"
        )
    return checked


def _with_answers(checked: dict[str, str], answers: dict[str, Any], where: str) -> dict[str, str]:
    """A row of preference data, with prompt and answers in one form."""
    normalize = normalized_pair if "chosen" in answers else normalized_answer
    checked |= normalize(**answers, where=where)
    check_forms(checked, _CHAT_FIELDS, where)
    prompt = json.loads(checked["prompt"])
    if checked["system"] and prompt[0]["role"] == "system":
        raise DataError(
            f"{where}: the column 'system' and the first message are both system messages; leave "
            "one out"
        )
    return checked


def row_columns(row: Any, where: str) -> Mapping[str, Any]:
    """Values of a row by column.

    Raises:
      DataError: the row is not an object.
    """
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where}: a row must be an object with named columns, got {describe_value(row)}"
        )
    return row


def label_number(value: Any, classification: ClassificationConfig, where: str) -> float:
    """Class index of a label, or its number for regression.

    A string is a class name. An integer is a class index from 0, unless class names are numeric:
    then it is a class name too. A string of a number is that number: tables of text have no others.

    Args:
      value: label as read from the row.
      classification: class names, or regression.
      where: file, row and column, for messages.

    Raises:
      DataError: the label is not a class, or not a finite number for regression.
    """
    if classification.regression:
        number = math.nan
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):  # of a text that is no number
                number = float(value)
        if not math.isfinite(number):
            raise DataError(f"{where} must be a finite number, got {json.dumps(value)}")
        return number
    labels = classification.labels
    if isinstance(value, str | int) and not isinstance(value, bool):
        if str(value) in labels:
            return float(labels.index(str(value)))
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
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
