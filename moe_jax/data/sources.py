"""Data sets as cached tables of checked rows, read from local files or from the hub.

Local files are read by this package's readers and hub data sets by `datasets`. Both give a
memory-mapped `datasets.Dataset` whose columns are the fields of the schema plus `where`, the file
and line of a row.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError

from moe_jax.config.data import SourceConfig
from moe_jax.data.readers import READERS, read_rows
from moe_jax.data.schema import FIELDS, check_row, column_names
from moe_jax.data.tokenizer import first_line
from moe_jax.data.values import without_filled_keys
from moe_jax.errors import DataError

TOKEN_CACHE_VERSION = 2
"""Version of the cached tables, part of every cache key.

Raise it with every change to this package that gives equal data other checked rows, token ids, loss
masks or labels, or that changes a table's columns: tables in users' caches are then made again.
Everything else that decides a table's content (data, schema, tokenizer, prompt template, lengths,
labels, version of `datasets`) is in the key already.
"""

# Words in file names for each split; the keys are the hub's names.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class RowTable(NamedTuple):
    """Checked rows, and their cache key; equal rows may have different keys."""

    rows: datasets.Dataset
    key: str


ReadSource = Callable[[SourceConfig, str | None], RowTable]
"""A reader of data sets: `read_source`, or `read_source_or_task` of `moe_jax.tasks`."""


def read_source(source: SourceConfig, cache_dir: str | None) -> RowTable:
    """Reads all rows of a source's split and checks them against its schema.

    Args:
      source: data set to read.
      cache_dir: cache folder of the table; None takes that of `datasets`.

    Raises:
      DataError: the data set is missing or unreadable, a row does not fit, or the split is empty.
    """
    if source.task is not None:
        raise ValueError(f"{source.title}: tasks are read by moe_jax.tasks.training_rows")
    column_names(source)
    path = Path(source.path).expanduser()
    if path.exists():
        split, _, _ = source.split.partition("[")
        files = _files(path, split)
        table = _read_files(files, source, cache_dir)
        table = select_part(table, source, split)
    elif _looks_local(source.path):
        raise DataError(f"{source.path}: no such file or folder")
    else:
        table = _read_hub(source, cache_dir)
    if not len(table.rows):
        raise _no_rows(source)
    return table


def _no_rows(source: SourceConfig) -> DataError:
    return DataError(f"{source.path}: the split {source.split!r} holds no rows")


def _looks_local(path: str) -> bool:
    return (
        path.startswith((".", "/", "~"))
        or Path(path).suffix.lower() in READERS
        or HUB_ID.fullmatch(path) is None
    )


def _files(path: Path, split: str) -> list[Path]:
    """Data files of one split, sorted by name."""
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{path}: unknown kind of file; known: {', '.join(READERS)}")
        if split != "train":
            raise DataError(
                f"{path}: a single file has no split {split!r}; leave it at 'train', or use a "
                "part of the file, for example 'train[:90%]'"
            )
        return [path]
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in READERS)
    if not files:
        raise DataError(f"{path}: the folder holds no {', '.join(READERS)} file")
    split_files = [f for f in files if _is_named(f.relative_to(path), split)]
    if split_files:
        return split_files
    splits = [s for s in SPLIT_WORDS if any(_is_named(f.relative_to(path), s) for f in files)]
    if splits or split != "train":
        raise DataError(
            f"{path}: no file is named after the split {split!r}; "
            f"splits found: {', '.join(splits) or 'none, which counts as train'}"
        )
    return files


def _is_named(path: Path, split: str) -> bool:
    words = "|".join(map(re.escape, SPLIT_WORDS.get(split, (split,))))
    return re.search(rf"(^|[-_./ ])({words})($|[-_./ 0-9])", path.as_posix()) is not None


def _read_files(files: list[Path], source: SourceConfig, cache_dir: str | None) -> RowTable:
    parts = []
    for file in files:
        try:
            with file.open("rb") as content:
                parts.append((str(file), hashlib.file_digest(content, "sha256").hexdigest()))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    key = cache_key(parts, source.schema, column_names(source))
    with progress_bars(), cache_errors(cache_dir):
        rows = datasets.Dataset.from_generator(
            _checked_rows,
            features=_features(source),
            cache_dir=cache_dir or str(HF_DATASETS_CACHE),
            # A tuple, because `datasets` takes lists for shards.
            gen_kwargs={"files": tuple(files), "source": source},
            fingerprint=key,
        )
    return RowTable(rows, key)


def _checked_rows(files: tuple[Path, ...], source: SourceConfig) -> Iterator[dict[str, str]]:
    is_empty = True
    for file in files:
        for where, row in read_rows(file):
            is_empty = False
            yield {**check_row(row, source, where), "where": where}
    if is_empty:  # the cache builder refuses a generator without rows
        raise _no_rows(source)


def _read_hub(source: SourceConfig, cache_dir: str | None) -> RowTable:
    # The hub's libraries raise many types, for no network, no such id, no such split and no access.
    try:
        with progress_bars():
            raw = datasets.load_dataset(
                source.path,
                name=source.name,
                split=source.split,
                revision=source.revision,
                cache_dir=cache_dir,
            )
    except Exception as error:
        raise DataError(
            f"{source.path}: no such file or folder, and not readable as a hub data set "
            f"({first_line(error)})"
        ) from error
    # `datasets` keeps downloads in folders named after the content's version.
    files = [file["filename"] for file in raw.cache_files]
    key = cache_key(files, source.path, source.split, source.schema, column_names(source))
    with progress_bars(), cache_errors(cache_dir):
        rows = raw.map(
            _check_hub_row,
            with_indices=True,
            fn_kwargs={"source": source},
            remove_columns=raw.column_names,
            features=_features(source),
            new_fingerprint=key,
        )
    return RowTable(rows, key)


def _check_hub_row(row: Any, index: int, source: SourceConfig) -> dict[str, str]:
    where = f"{source.path}, {source.split}: row {index + 1}"
    return {**check_row(without_filled_keys(row), source, where), "where": where}


def select_part(table: RowTable, source: SourceConfig, split: str) -> RowTable:
    """Selects the rows of a part of a split, such as `train[:90%]`, from the split's table.

    Args:
      table: rows of the full split.
      source: data set, whose `split` names the part.
      split: name of the full split.

    Raises:
      DataError: there is no such part.
    """
    if source.split == split:
        return table
    try:
        instruction = datasets.ReadInstruction.from_spec(source.split)
        parts = instruction.to_absolute({split: len(table.rows)})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source.title}: cannot take the split {source.split!r} of {len(table.rows)} rows "
            f"({first_line(error)})"
        ) from None
    kept = [row for part in parts for row in range(part.from_ or 0, part.to or 0)]
    return RowTable(table.rows.select(kept), cache_key(table.key, source.split))


def _features(source: SourceConfig) -> datasets.Features:
    text = datasets.Value("string")
    return datasets.Features(dict.fromkeys((*FIELDS[source.schema], "where"), text))


def cache_key(*parts: Any) -> str:
    """Cache key of a table made from `parts`, plain data; see `TOKEN_CACHE_VERSION`."""
    versions = [TOKEN_CACHE_VERSION, datasets.__version__]
    content = json.dumps([*versions, parts], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


@contextlib.contextmanager
def progress_bars(show: bool = False) -> Iterator[None]:
    """Shows the progress bars of `datasets` within this context only if `show`."""
    hidden_before = datasets.are_progress_bars_disabled()
    if not show:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden_before:
            datasets.enable_progress_bars()


_ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EEXIST: "move that file away",
    errno.ENOTDIR: "move that file away",
}


@contextlib.contextmanager
def cache_errors(cache_dir: str | None) -> Iterator[None]:
    """Unwraps a DataError that `datasets` wraps, and names a cache folder that is not writable."""
    try:
        yield
    except (DatasetGenerationError, OSError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DataError | OSError):
            cause = cause.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        if isinstance(cause, OSError):
            reason = os.strerror(cause.errno).lower() if cause.errno else first_line(cause)
            advice = _ADVICE.get(cause.errno or 0, "make that folder writable")
            setting = "data.cache_dir" + (
                "" if cache_dir else ", or the environment's HF_DATASETS_CACHE,"
            )
            raise DataError(
                f"cannot keep the tokenised data in {cache_dir or HF_DATASETS_CACHE}: {reason}; "
                f"{advice}, or set {setting} to another one"
            ) from error
        raise
