"""JSON of others: text that ends in an error of one kind, however it is made."""

import json
from pathlib import Path
from typing import Any

from moe_jax.errors import CheckpointError

MAX_DEPTH = 100
"""Deepest nesting of lists and objects. Python functions that recurse reach about 300."""


def parse_json(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
      ValueError: the text is not JSON or not UTF-8, is nested deeper than `MAX_DEPTH`, or has an
        integer with more digits than Python converts. A `json.JSONDecodeError` has the position.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # Python's message is about a setting of the interpreter
        raise ValueError("an integer has too many digits") from None
    if isinstance(text, bytes):
        brackets = text.count(b"[") + text.count(b"{")
    else:
        brackets = text.count("[") + text.count("{")
    if brackets > MAX_DEPTH:
        _require_depth(value)
    return value


def read_json_object(file: Path, remedy: str = "download it again") -> dict[str, Any]:
    """Reads a file that holds one JSON object; a byte order mark at its start is skipped.

    Args:
      file: file to read.
      remedy: what to do about a damaged file, for the message.

    Raises:
      CheckpointError: the file cannot be read, or holds anything else.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{file}: expected an object, got {kind}; {remedy}")
    return content


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


def _require_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [
            item
            for container in nested
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
