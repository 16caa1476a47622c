"""A row of a data set, whose fields are checked as they are asked for."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.parse import suggest
from moe_jax.errors import DataError


@dataclass(frozen=True)
class TaskRow:
    """A row and the place that it came from.

    Every method raises a `DataError` that names the place and the column where the row does not
    hold what is asked for.

    Attributes:
      where: file and line or row, for messages.
      fields: the row's own columns.
    """

    where: str
    fields: Mapping[str, Any]

    @classmethod
    def checked(cls, where: str, value: Any) -> "TaskRow":
        """A row out of whatever a file holds."""
        if not isinstance(value, Mapping):
            raise DataError(
                f"{where}: a row must be an object with named columns, got {kind(value)}"
            )
        return cls(where, value)

    def value(self, column: str) -> Any:
        """Whatever stands in a column, as long as there is one."""
        if column not in self.fields:
            columns = ", ".join(map(str, self.fields)) or "none"
            raise DataError(f"{self.where}: no column {column!r} (it has: {columns})")
        return self.fields[column]

    def text(self, column: str) -> str:
        """A text that is not blank, without the blanks around it."""
        return self._text(self.value(column), f"column {column!r}")

    def texts(self, column: str, count: int | None = None) -> tuple[str, ...]:
        """A list of texts; `count` of them, or at least two."""
        values = self.value(column)
        if not isinstance(values, list | tuple):
            raise DataError(f"{self.where}: column {column!r} must be a list, got {kind(values)}")
        if len(values) != count if count else len(values) < 2:
            wanted = str(count) if count else "at least 2"
            raise DataError(
                f"{self.where}: column {column!r} must hold {wanted} texts, got {len(values)}"
            )
        return tuple(
            self._text(value, f"column {column!r}, item {number}")
            for number, value in enumerate(values, 1)
        )

    def group(self, column: str) -> "TaskRow":
        """A column that has columns of its own."""
        value = self.value(column)
        if not isinstance(value, Mapping):
            raise DataError(f"{self.where}: column {column!r} must be an object, got {kind(value)}")
        return TaskRow(f"{self.where}: {column}", value)

    def position(self, column: str, known: Sequence[str]) -> int:
        """Which of the `known` values a column holds; a number counts as its digits."""
        value = self.value(column)
        text = str(value) if isinstance(value, str) or type(value) is int else None
        if text is None or text not in known:
            raise DataError(
                f"{self.where}: column {column!r} is {kind(value)}, not one of {', '.join(known)}; "
                "take a split whose answers are public, or fix the row"
            )
        return list(known).index(text)

    def flag(self, column: str) -> bool:
        """True or false."""
        value = self.value(column)
        if not isinstance(value, bool):
            raise DataError(
                f"{self.where}: column {column!r} must be true or false, got {kind(value)}; take a "
                "split whose answers are public, or fix the row"
            )
        return value

    def _text(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{self.where}: {what} must be a text that is not blank, got {kind(value)}"
            )
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{self.where}: {what} holds an unpaired surrogate, which is not a character"
            ) from None
        return value.strip()


def kind(value: Any) -> str:
    """A value's type and its beginning, for messages."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} ({text if len(text) <= 40 else text[:37] + '...'})"


# FIXME docstring of the merged tasks.sources:
# """The rows of a task's split, from local files or from the hub.
#
# A local folder has the hub's schema: files named after their split (`test.jsonl`,
# `test-00000-of-00001.parquet`), in the folder itself or in one named after the data set's
# configuration (`ARC-Easy/`).
# """


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


def read_hub(hub: HubData, split: str, limit: int | None) -> list[TaskRow]:
    """The first `limit` rows of a hub data set's split.

    Raises:
      DataError: the hub cannot be reached, or has no such data set or split.
    """
    import datasets

    from moe_jax.data.sources import progress_bars
    from moe_jax.data.tokenizer import first_line

    # The hub's libraries raise many types, for no network, no such id, no such split and no access.
    try:
        with progress_bars():
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
    rows = [TaskRow.checked(where, row) for where, row in itertools.islice(pairs, limit)]
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
