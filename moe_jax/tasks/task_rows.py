"""Rows of a task's split, from local files or from the hub, with columns checked on access.

A local folder has the hub's schema: files named after their split (`test.jsonl`,
`test-00000-of-00001.parquet`), in the folder itself or in a subfolder named after the data set's
configuration (`ARC-Easy/`).
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.parse import suggest
from moe_jax.data.files import KINDS, file_kind, folder_files
from moe_jax.data.values import describe_value
from moe_jax.errors import DataError
from moe_jax.files.hub_log import quiet_retries


@dataclass(frozen=True)
class TaskRow:
    """A row of a task's data set.

    Every method raises a `DataError` that names the row and the column if a column is missing or of
    another type.

    Attributes:
      where: file and line or row, for messages.
      fields: values by column.
    """

    where: str
    fields: Mapping[str, Any]

    @classmethod
    def checked(cls, where: str, value: Any) -> "TaskRow":
        """Creates a row from a value read from a file."""
        if not isinstance(value, Mapping):
            raise DataError(
                f"{where}: a row must be an object with named columns, got {describe_value(value)}"
            )
        return cls(where, value)

    def value(self, column: str) -> Any:
        """Value of a column, of any type."""
        if column not in self.fields:
            columns = ", ".join(map(str, self.fields)) or "none"
            raise DataError(f"{self.where}: no column {column!r} (it has: {columns})")
        return self.fields[column]

    def text(self, column: str) -> str:
        """Non-blank text, stripped."""
        return self._text(self.value(column), f"column {column!r}")

    def texts(self, column: str, count: int | None = None) -> tuple[str, ...]:
        """List of `count` texts, or of at least two."""
        values = self.value(column)
        if not isinstance(values, list | tuple):
            raise self._error(column, f"must be a list, got {describe_value(values)}")
        if len(values) != count if count else len(values) < 2:
            expected = str(count) if count else "at least 2"
            raise self._error(column, f"must hold {expected} texts, got {len(values)}")
        return tuple(
            self._text(value, f"column {column!r}, item {number}")
            for number, value in enumerate(values, 1)
        )

    def group(self, column: str) -> "TaskRow":
        """Nested columns of a column."""
        value = self.value(column)
        if not isinstance(value, Mapping):
            raise self._error(column, f"must be an object, got {describe_value(value)}")
        return TaskRow(f"{self.where}: {column}", value)

    def position(self, column: str, known: Sequence[str]) -> int:
        """Index of a column's value among the `known` ones; a number is compared by its digits."""
        value = self.value(column)
        text = str(value) if isinstance(value, str) or type(value) is int else None
        if text is None or text not in known:
            raise self._error(
                column,
                f"is {describe_value(value)}, not one of {', '.join(known)}; use a split whose "
                "answers are public, or fix the row",
            )
        return list(known).index(text)

    def flag(self, column: str) -> bool:
        """Boolean value of a column."""
        value = self.value(column)
        if not isinstance(value, bool):
            raise self._error(
                column,
                f"must be true or false, got {describe_value(value)}; use a split whose answers "
                "are public, or fix the row",
            )
        return value

    def _error(self, column: str, problem: str) -> DataError:
        return DataError(f"{self.where}: column {column!r} {problem}")

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            got = describe_value(value)
            raise DataError(f"{self.where}: {name} must be a text that is not blank, got {got}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{self.where}: {name} holds an unpaired surrogate, which is not a character"
            ) from None
        return value.strip()


FILE_KINDS = tuple(kind for kind in KINDS if kind != ".txt")
"""Kinds of files whose rows have columns."""


class HubData(NamedTuple):
    """A data set on the hub.

    Attributes:
      dataset: id of the data set.
      config: configuration of the data set, if it has several.
      split: split to evaluate: the usual one with public answers.
      shots_split: split of the answered examples (shots) in a prompt.
    """

    dataset: str
    config: str | None
    split: str
    shots_split: str


def read_hub(hub: HubData, split: str, limit: int | None) -> list[TaskRow]:
    """Reads the first `limit` rows of a split of a data set on the hub.

    Raises:
      DataError: the hub cannot be reached, or has no such data set or split.
    """
    import datasets

    from moe_jax.data.sources import progress_bars
    from moe_jax.data.tokenizer import first_line

    # The hub's libraries raise many types, for no network, no such id, no such split and no access.
    try:
        with progress_bars(), quiet_retries():
            table = datasets.load_dataset(hub.dataset, name=hub.config, split=split)
    except Exception as error:
        raise DataError(
            f"{hub.dataset}: the split {split!r} of this hub data set cannot be read "
            f"({first_line(error)}); without a network, give a local folder (--data)"
        ) from error
    where = f"{hub.dataset}, {split}"
    rows = itertools.islice(table, limit)
    return [
        TaskRow.checked(f"{where}: row {number}", dict(row)) for number, row in enumerate(rows, 1)
    ]


def read_local(path: Path, config: str | None, split: str, limit: int | None) -> list[TaskRow]:
    """Reads the first `limit` rows of a local split.

    Args:
      path: file with the rows of the split, or folder.
      config: configuration of the data set; a subfolder of `path` may have its name.
      split: split, after which the files of a folder are named.
      limit: largest number of rows; None reads all.

    Raises:
      DataError: the file is missing, cannot be read, or has no rows.
    """
    from moe_jax.data.readers import read_rows

    path = path.expanduser()
    if path.is_dir():
        files = _split_files(path / config if config and (path / config).is_dir() else path, split)
    elif path.is_file() and file_kind(path) in FILE_KINDS:
        files = [path]
    else:
        problem = "unknown kind of file" if path.is_file() else "no such file or folder"
        raise DataError(
            f"{path}: {problem}; give a {', '.join(FILE_KINDS)} file or a folder of these"
        )
    pairs: Iterator = itertools.chain.from_iterable(read_rows(file) for file in files)
    rows = [TaskRow.checked(where, row) for where, row in itertools.islice(pairs, limit)]
    if not rows:
        raise DataError(f"{path}: the split {split!r} holds no rows")
    return rows


def _split_files(folder: Path, split: str) -> list[Path]:
    """Files named after the split, of those that hold data."""
    files = folder_files(folder, FILE_KINDS).files
    if not files:
        raise DataError(f"{folder}: the folder holds no {', '.join(FILE_KINDS)} file")
    # Only the exact name of the split: MMLU has both `dev` and `validation`.
    pattern = re.compile(rf"(^|[-_./]){re.escape(split)}($|[-_./])")
    named = [file for file in files if pattern.search(file.relative_to(folder).as_posix())]
    if not named:
        hint = suggest(split, {file.relative_to(folder).as_posix() for file in files})
        raise DataError(f"{folder}: no file is named after the split {split!r}; {hint}")
    return named
