"""The cache of tables of rows and of tokens, each made once and checked whenever it is opened.

An entry is a folder of Arrow files and their digests. It appears complete or not at all, and one
that is damaged is made again. Reading it for the check costs as much as reading it once more.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError

from moe_jax.data.tokenizer import first_line
from moe_jax.errors import DataError
from moe_jax.files.digests import find_damage, read_digests, write_digests
from moe_jax.terminal import print_shown

TOKEN_CACHE_VERSION = 5
"""Version of the cached tables, part of every cache key.

Raise it with every change to this package that gives equal data other checked rows, token ids, loss
masks or labels, or that changes a table's columns: tables in users' caches are then made again.
Everything else that decides a table's content (data, schema, tokenizer, prompt template, lengths,
labels, version of `datasets`) is in the key already.
"""


def cached_table(
    cache_dir: str | None, key: str, make: Callable[[Path], datasets.Dataset]
) -> datasets.Dataset:
    """Memory-mapped table of a key, from the cache if it holds an intact one.

    Args:
      cache_dir: folder of the cache; None takes that of `datasets`.
      key: from `cache_key`.
      make: makes the table; its Arrow files lie in the folder that it is called with.

    Raises:
      DataError: of `make`, or the cache is not writable.
    """
    entry = _entry(cache_dir, key)
    with cache_errors(cache_dir):
        if entry.is_dir() and find_damage(entry) is None:
            return _open(entry)
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _lock(entry.with_name(f"{key}.lock")):
            if entry.exists():  # damaged, or made by another process while this one waited
                damage = find_damage(entry)
                if damage is None:
                    return _open(entry)
                print_shown(f"{entry}: {damage}; the table is made again", file=sys.stderr)
                shutil.rmtree(entry)
            _make(entry, make)
        return _open(entry)


def find_table(cache_dir: str | None, key: str) -> datasets.Dataset | None:
    """Memory-mapped table of a key, if the cache holds an intact one; see `cached_table`."""
    entry = _entry(cache_dir, key)
    with cache_errors(cache_dir):
        return _open(entry) if entry.is_dir() and find_damage(entry) is None else None


def _entry(cache_dir: str | None, key: str) -> Path:
    return Path(cache_dir or HF_DATASETS_CACHE).expanduser() / "moe_jax" / key


def _open(entry: Path) -> datasets.Dataset:
    files = [str(entry / name) for name in sorted(read_digests(entry))]
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


def _make(entry: Path, make: Callable[[Path], datasets.Dataset]) -> None:
    incomplete = entry.with_name(f".{entry.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    try:
        made = incomplete / "made"
        made.mkdir(parents=True)
        for number, file in enumerate(make(made).cache_files):
            os.rename(file["filename"], incomplete / f"{number:05d}.arrow")
        shutil.rmtree(made)
        write_digests(incomplete)
        incomplete.rename(entry)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Waits for other processes that make the same table; the lock ends with the process."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


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
                f"cannot keep the tokenized data in {cache_dir or HF_DATASETS_CACHE}: {reason}; "
                f"{advice}, or set {setting} to another one"
            ) from error
        raise
