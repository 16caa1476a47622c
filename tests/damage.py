"""Faults of files, as disks, copies and people make them."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moe_jax.errors import UserError

_T = TypeVar("_T")


def flip(file: Path, place: int | None = None, bit: int = 4) -> None:
    """Flips a bit of a byte; of the middle one without a place."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1 << bit
    file.write_bytes(content)


def cut(file: Path, length: int | None = None) -> None:
    """Keeps the first bytes; the first half without a length."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2 if length is None else length])


def empty(file: Path) -> None:
    """Removes the content."""
    file.write_bytes(b"")


def remove(file: Path) -> None:
    """Removes the file."""
    file.unlink()


FAULTS: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "cut": cut,
    "empty": empty,
    "remove": remove,
}


def files_below(folder: Path, pattern: str = "*") -> list[Path]:
    """Files below a folder, in the order of their paths."""
    return sorted(file for file in folder.rglob(pattern) if file.is_file())


def refusal(read: Callable[[], _T], check: Callable[[_T], None]) -> str | None:
    """The message of the error that reading raises; without one, what was read is checked."""
    try:
        found = read()
    except UserError as error:
        message = str(error)
    else:
        check(found)
        return None
    assert "\n" not in message
    return message
