"""Text for the terminal: control characters shown as escapes, and values and messages cut to size.

Names of files, values of configurations and generated text come from others. A terminal would
execute the escape sequences in them.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any, TextIO

MAX_MESSAGE = 1000
"""Largest number of characters of a message."""

_MAX_VALUE = 60
_END = 350  # characters at the end of a message, which say what to do

# Control characters except line feed and tab, controls of the direction of text, and surrogates,
# which no encoding has.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""The text with control characters as escapes such as `\x1b`."""
    return _CONTROLS.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def print_shown(text: str = "", *, end: str = "\n", file: TextIO | None = None) -> None:
    """Prints `encodable(text)` at once."""
    stream = sys.stdout if file is None else file
    print(encodable(text, stream), end=end, file=stream, flush=True)


def encodable(text: str, stream: TextIO) -> str:
    """`shown(text)`, with escapes for characters that the stream cannot encode too."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return shown(text).encode(encoding, "backslashreplace").decode(encoding)


def shortened(text: str, most: int = MAX_MESSAGE) -> str:
    """The text without its middle, where it has more than `most` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most - _END - 5]} ... {text[-_END:]}"


def first_of(texts: Sequence[str], most: int = 3) -> str:
    """The first texts with semicolons between them, and how many more there are."""
    more = f" (and {len(texts) - most} more)" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more


def describe_value(value: Any) -> str:
    """Type and beginning of a value, for messages."""
    return "None" if value is None else f"{type(value).__name__} ({value_text(value)})"


def value_text(value: Any) -> str:
    """Beginning of a value's `repr` on one line, for messages; any value has one."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # noqa: BLE001  # 5,000 digits, deep nesting, others' `__repr__`
        return f"{type(error).__name__} when shown"
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 3]}..."
