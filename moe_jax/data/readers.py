"""Readers of local data files, one for each kind; each yields rows with their file and line.

`datasets` could read these files itself, but it reports a bad row by an Arrow offset or not at all,
guesses types (a column of ISO dates becomes timestamps), and gives all rows the keys of every row.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_jax.data.files import file_kind, unknown_kind
from moe_jax.data.tokenizer import first_line
from moe_jax.data.values import without_filled_keys
from moe_jax.errors import DataError
from moe_jax.files.json_file import parse_json

Rows = Iterator[tuple[str, Any]]

_BATCH_ROWS = 1024
"""Rows of a columnar file that are converted at once."""


def read_rows(path: Path) -> Rows:
    """Yields `(where, row)` for every row of a data file; `where` counts lines and rows from 1.

    Raises:
      DataError: the file cannot be read, or its content does not match its extension.
    """
    kind = file_kind(path)
    if kind is None:
        raise unknown_kind(path)
    try:
        yield from READERS[kind](path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields `(where, line)` for every line of a text file, decompressed, with its line break.

    Lines end with a line feed: texts may hold other line separators. Byte order marks are removed,
    which files that were joined have within.

    Raises:
      DataError: the file cannot be read, is damaged, or is not UTF-8 text.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                text = _decode(line, f"{path}: line {number}")
                yield f"{path}: line {number}", text.removeprefix("\ufeff")
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        raise _damaged(path, number, error) from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, number, error) from None


def _damaged(path: Path, lines: int, error: Exception) -> DataError:
    kind = path.suffix.lower().removeprefix(".")
    reason = f"{lines} lines could be read; {first_line(error)}"
    return DataError(f"{path}: is incomplete or no {kind} file ({reason})")


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(path, "rb")


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8 text") from None


def _read_json(path: Path) -> Rows:
    """Reads a list of objects, or one object per line: both are common under each name."""
    lines, is_first = read_lines(path), True
    for where, text in lines:
        if not text.strip():
            continue
        if is_first and text.lstrip().startswith("["):
            yield from _json_list(path, where, text, lines)
            return
        is_first = False
        try:
            yield where, parse_json(text.rstrip())  # a column beyond the line would mislead
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON ({error.msg}, column {error.colno}); each line must be "
                "one object, or the file one list"
            ) from None
        except ValueError as error:
            raise _beyond_limits(where, error) from None


def _json_list(path: Path, where: str, start: str, lines: Iterator[tuple[str, str]]) -> Rows:
    number = int(where.rpartition(" ")[2])
    content = start + "".join(text for _, text in lines)
    try:
        rows = parse_json(content)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise DataError(
            f"{path}: line {line}: not valid JSON ({error.msg}, column {error.colno}); the file "
            "begins with '[', so it must be one list"
        ) from None
    except ValueError as error:
        raise _beyond_limits(str(path), error) from None
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _beyond_limits(where: str, error: Exception) -> DataError:
    """Error of JSON with a number too long, or nested too deep, for Python."""
    return DataError(f"{where}: cannot be read ({error}); correct or remove the value")


def _read_text(path: Path) -> Rows:
    """Reads blocks of lines between blank lines; line breaks inside a block are kept."""
    block, first = [], ""
    for where, line in read_lines(path):
        text = line.rstrip("\r\n")
        if text.strip():
            first = first if block else where
            block.append(text)
        elif block:
            yield first, {"text": "\n".join(block)}
            block = []
    if block:
        yield first, {"text": "\n".join(block)}


def _read_table(path: Path, delimiter: str) -> Rows:
    """Reads a table with a header; cells may be quoted as in RFC 4180, and all are text."""
    lines = read_lines(path)
    reader = csv.reader((text for _, text in lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}: line {reader.line_num + 1}"
        cells = _next_cells(reader, where)
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if header is None:
            header = _header(cells, where)
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{where}: {len(cells)} cells in a row, but the header has {len(header)} columns; "
                "quote cells that hold the delimiter, a quote or a line break"
            )
        yield where, dict(zip(header, cells, strict=True))


def _next_cells(reader: Any, where: str) -> list[str] | None:
    """Cells of the next row, of any length; None at the end of the file."""
    limit = csv.field_size_limit(2**31 - 1)  # a setting of the process, so it is restored
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(
            f"{where}: not valid CSV ({error}); a cell that begins with a quote ends with one, and "
            "quotes within it are doubled"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _header(cells: Sequence[str], where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for name in header:
        if header.count(name) > 1:
            raise DataError(f"{where}: the header names {name!r} twice; rename one column")
    return header


def _read_parquet(path: Path) -> Rows:
    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH_ROWS)

    return _columnar_rows(path, "Parquet", batches())


def _read_arrow(path: Path) -> Rows:
    """Reads the file format of Arrow (also named Feather) or its stream format."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                with pa.ipc.open_file(source) as file:
                    for index in range(file.num_record_batches):
                        yield file.get_batch(index)
            else:
                with pa.ipc.open_stream(source) as stream:
                    yield from stream

    def checked() -> Iterator[pa.RecordBatch]:
        for batch in batches():
            batch.validate(full=True)  # Arrow trusts offsets; a damaged one would end the process
            yield batch

    return _columnar_rows(path, "Arrow", checked())


def _columnar_rows(path: Path, kind: str, batches: Iterator[pa.RecordBatch]) -> Rows:
    number = 0
    try:
        for batch in batches:
            _require_distinct(batch.schema.names, path)
            for start in range(0, len(batch), _BATCH_ROWS):
                for row in _python_rows(batch.slice(start, _BATCH_ROWS), path, number):
                    number += 1
                    yield f"{path}: row {number}", without_filled_keys(row)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path}: not a readable {kind} file after row {number} ({first_line(error)})"
        ) from None


def _require_distinct(names: Sequence[str], path: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: has two columns {name!r}; rename or remove one")


def _python_rows(batch: pa.RecordBatch, path: Path, before: int) -> list[dict[str, Any]]:
    """Rows of a batch; `before` is the number of rows in front of it."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError):  # dates, text and time zones beyond Python's
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, value in enumerate(column, before + 1):
                try:
                    value.as_py()
                except (ValueError, OverflowError, LookupError) as error:
                    raise DataError(
                        f"{path}: row {number}: column {name!r} holds a value that cannot be read "
                        f"({first_line(error)}); correct it, or leave the column out of the file"
                    ) from None
        raise


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".txt": _read_text,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
"""Reader of each of `files.KINDS`."""
