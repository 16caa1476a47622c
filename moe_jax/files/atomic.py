"""A file that is replaced in one step."""

import os
from pathlib import Path

from moe_jax.files.disk import disk_errors


def write_atomic(file: Path, content: str | bytes, kept: str = "") -> None:
    """Writes a file beside `file` and renames it, so that readers see the former content or this.

    Args:
      file: file in a folder that exists. A symbolic link is replaced, not followed.
      content: new content; text is encoded as UTF-8.
      kept: what is still valid if this fails, appended to the error message.

    Raises:
      CheckpointError: the disk is full, read-only or not writable; the former `file` is untouched.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    with disk_errors(file, kept):
        try:
            temporary.write_bytes(data)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
