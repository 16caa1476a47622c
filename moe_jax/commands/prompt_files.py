"""Prompts from a file: a line each, or rows that say more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.parse import suggest
from moe_jax.data.readers import read_rows
from moe_jax.errors import DataError

FIELDS = ("prompt", "messages", "input", "adapter", "id")
ENDINGS = (".txt", ".jsonl", ".json", ".parquet")


class GivenPrompt(NamedTuple):
    """A prompt as the user gave it.

    Attributes:
      where: names it in messages.
      text: empty if there are `messages`.
      messages: a conversation instead of a text.
      material: the input of an instruction.
      adapter: the name it asks for; only if `has_adapter`.
      has_adapter: whether it asks for one, or for the base.
      id: the user's own mark, which results repeat; None without one.
    """

    where: str
    text: str = ""
    messages: Any = None
    material: str = ""
    adapter: str | None = None
    has_adapter: bool = False
    id: Any = None


def read_prompts(path: Path) -> list[GivenPrompt]:
    """The prompts of a file.

    Raises:
      DataError: it cannot be read, holds none, or a row is not as it should be.
    """
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path}: is none of {', '.join(ENDINGS)}; see --help for what they hold")
    if path.suffix.lower() == ".txt":
        prompts = _lines(path)
    else:
        prompts = [_prompt(row, where) for where, row in read_rows(path)]
    if not prompts:
        raise DataError(f"{path}: holds no prompt")
    return prompts


def _lines(path: Path) -> list[GivenPrompt]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text") from None
    return [
        GivenPrompt(f"{path}: line {number}", line.removesuffix("\r"))
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _prompt(row: Any, where: str) -> GivenPrompt:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be an object with named columns, got {row!r:.40}")
    for name in row:
        if name not in FIELDS:
            raise DataError(f"{where}: unknown column {name!r}; {suggest(str(name), FIELDS)}")
    texts = {name: row.get(name) for name in ("prompt", "input", "adapter")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: column {name!r} must be text, got {value!r:.40}")
    if (texts["prompt"] is None) == (row.get("messages") is None):
        raise DataError(f"{where}: must have either the column 'prompt' or the column 'messages'")
    return GivenPrompt(
        where,
        texts["prompt"] or "",
        row.get("messages"),
        texts["input"] or "",
        texts["adapter"],
        "adapter" in row,
        row.get("id"),
    )
