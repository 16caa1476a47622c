"""The rows of a task's split, from local files or from the hub.

A local folder has the hub's schema: files named after their split (`test.jsonl`,
`test-00000-of-00001.parquet`), in the folder itself or in one named after the data set's
configuration (`ARC-Easy/`).
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_jax.config.parse import suggest
from moe_jax.errors import DataError
from moe_jax.tasks.rows import Row

KINDS = (".json", ".jsonl", ".parquet")


class HubData(NamedTuple):
    """A data set on the hub.

    Attributes:
      dataset: its id.
      config: its configuration, where it has several.
      split: the split whose answers are public, by which models are compared.
      shots_split: the split that examples in a prompt are taken from.
    """

    dataset: str
    config: str | None
    split: str
    shots_split: str


def read_hub(hub: HubData, split: str, limit: int | None) -> list[Row]:
    """The first `limit` rows of a hub data set's split.

    Raises:
      DataError: the hub cannot be reached, or has no such data set or split.
    """
    import datasets

    from moe_jax.data.sources import quiet
    from moe_jax.data.tokenizer import first_line

    # The hub's libraries raise many types, for no network, no such id, no such split and no access.
    try:
        with quiet():
            table = datasets.load_dataset(hub.dataset, name=hub.config, split=split)
    except Exception as error:
        raise DataError(
            f"{hub.dataset}: the split {split!r} of this hub data set cannot be read "
            f"({first_line(error)}); without a network, give a local folder (--data)"
        ) from error
    where = f"{hub.dataset}, {split}"
    rows = itertools.islice(table, limit)
    return [Row.checked(f"{where}: row {number}", dict(row)) for number, row in enumerate(rows, 1)]


def read_local(path: Path, config: str | None, split: str, limit: int | None) -> list[Row]:
    """The first `limit` rows of a local split.

    Args:
      path: a file, whose rows are the split, or a folder.
      config: the configuration after which a folder in `path` may be named.
      split: after which the files are named.
      limit: rows at most; None takes all.

    Raises:
      DataError: there is no such file, it cannot be read, or it has no rows.
    """
    from moe_jax.data.readers import read_rows

    path = path.expanduser()
    if path.is_dir():
        files = _split_files(path / config if config and (path / config).is_dir() else path, split)
    elif path.is_file() and path.suffix.lower() in KINDS:
        files = [path]
    else:
        problem = "unknown kind of file" if path.is_file() else "no such file or folder"
        raise DataError(f"{path}: {problem}; give a {', '.join(KINDS)} file or a folder of these")
    pairs: Iterator = itertools.chain.from_iterable(read_rows(file) for file in files)
    rows = [Row.checked(where, row) for where, row in itertools.islice(pairs, limit)]
    if not rows:
        raise DataError(f"{path}: the split {split!r} holds no rows")
    return rows


def _split_files(folder: Path, split: str) -> list[Path]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix.lower() in KINDS)
    if not files:
        raise DataError(f"{folder}: the folder holds no {', '.join(KINDS)} file")
    # Exactly the split's own name: MMLU has both `dev` and `validation`.
    pattern = re.compile(rf"(^|[-_./]){re.escape(split)}($|[-_./])")
    named = [file for file in files if pattern.search(file.relative_to(folder).as_posix())]
    if not named:
        hint = suggest(split, {file.relative_to(folder).as_posix() for file in files})
        raise DataError(f"{folder}: no file is named after the split {split!r}; {hint}")
    return named
