"""JSON files that other programs wrote."""

import json
from pathlib import Path
from typing import Any

from moe_jax.errors import CheckpointError


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object; a byte order mark at its start is skipped.

    Raises:
      CheckpointError: the file cannot be read, or holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected an object, got {type(content).__name__}")
    return content
