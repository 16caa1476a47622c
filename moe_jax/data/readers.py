"""Readers of local data files, one for each kind; each yields rows with their file and line.

`datasets` could read these files itself, but it reports a bad row by an Arrow offset or not at all,
guesses types (a column of ISO dates becomes timestamps), and gives all rows the keys of every row.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_jax.data.tokenizer import first_line
from moe_jax.data.values import without_filled_keys
from moe_jax.errors import DataError

Rows = Iterator[tuple[str, Any]]


def read_rows(path: Path) -> Rows:
    """Yields `(where, row)` for every row of a data file; `where` counts lines and rows from 1.

    Raises:
      DataError: the file cannot be read, or its content does not match its extension.
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_json(path: Path) -> Rows:
    """Reads a list of objects, or one object per line: both are common in `.json` files."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":
        yield from _read_json_lines(path)
        return
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _read_json_lines(path: Path) -> Rows:
    # Lines are split as bytes: strings may hold line separators other than \n.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}: line {number}"
            text = _decode(line, where).removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                yield where, json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not valid JSON ({error.msg}, column {error.colno}); each line must "
                    "be one object" + (", or the file one list" if path.suffix == ".json" else "")
                ) from None


def _read_text(path: Path) -> Rows:
    """Reads blocks of lines between blank lines; line breaks inside a block are kept."""
    block, first = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(line, f"{path}: line {number}").removeprefix("\ufeff").rstrip("\r\n")
            if text.strip():
                first = first if block else number
                block.append(text)
            elif block:
                yield f"{path}: line {first}", {"text": "\n".join(block)}
                block = []
    if block:
        yield f"{path}: line {first}", {"text": "\n".join(block)}


def _read_parquet(path: Path) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", without_filled_keys(row)
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: not a readable Parquet file after row {number} ({first_line(error)})"
        ) from None


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8 text") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
