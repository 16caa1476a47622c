"""Digests, by which damage and changes by hand are seen.

SHA-256, which processors compute in hardware; a folder is read once, at the speed of the disk.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_jax.errors import CheckpointError

DIGESTS_FILE = "digests.json"
"""File in a folder with the digest of each of its files, by relative path, and its own."""


def content_digest(content: Any) -> str:
    """Digest of JSON values; the order of keys and the layout of the text do not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_digests(folder: Path, parts: Iterable[str] = (".",)) -> None:
    """Writes `DIGESTS_FILE` of a folder.

    Args:
      folder: folder that is complete.
      parts: subfolders whose files are digested; default all.

    Raises:
      OSError: the disk is full or not writable.
    """
    files = sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file())
    digests = {file.relative_to(folder).as_posix(): _file_digest(file) for file in files}
    content = {"files": digests, "digest": content_digest(digests)}
    (folder / DIGESTS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_digests(folder: Path) -> dict[str, str]:
    """Digests of a folder's files, by relative path.

    Raises:
      FileNotFoundError: there is no `DIGESTS_FILE`.
      CheckpointError: it is damaged.
    """
    file = folder / DIGESTS_FILE
    try:
        with file.open(encoding="utf-8") as stream:
            content = json.load(stream)
        if content["digest"] == content_digest(content["files"]):
            return dict(content["files"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise CheckpointError(f"{file} is damaged")


def find_damage(folder: Path, beginnings: Iterable[str] = ("",)) -> str | None:
    """First difference of a folder from its digests, as a clause for messages; None without one.

    Args:
      folder: folder with `DIGESTS_FILE`.
      beginnings: beginnings of the paths of the files to check; default all that have a digest.
    """
    checked = tuple(beginnings)
    try:
        for name, digest in read_digests(folder).items():
            if not name.startswith(checked):
                continue
            file = folder / name
            if ".." in file.parts or not file.is_relative_to(folder) or not file.is_file():
                return f"{name} is missing"
            if _file_digest(file) != digest:
                return f"{name} differs from its digest"
    except FileNotFoundError:
        return f"{DIGESTS_FILE} is missing"
    except CheckpointError:
        return f"{DIGESTS_FILE} is damaged"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return None


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
