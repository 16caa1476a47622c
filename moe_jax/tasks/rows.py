"""A row of a data set, whose fields are checked as they are asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.errors import DataError


@dataclass(frozen=True)
class Row:
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
    def checked(cls, where: str, value: Any) -> "Row":
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

    def group(self, column: str) -> "Row":
        """A column that has columns of its own."""
        value = self.value(column)
        if not isinstance(value, Mapping):
            raise DataError(f"{self.where}: column {column!r} must be an object, got {kind(value)}")
        return Row(f"{self.where}: {column}", value)

    def position(self, column: str, known: Sequence[str]) -> int:
        """Which of the `known` values a column holds; a number counts as its digits."""
        value = self.value(column)
        text = str(value) if isinstance(value, str) or type(value) is int else None
        if text is None or text not in known:
            raise DataError(
                f"{self.where}: column {column!r} is {kind(value)}, not one of {', '.join(known)}; "
                "take a split whose answers are public, or mend the row"
            )
        return list(known).index(text)

    def flag(self, column: str) -> bool:
        """True or false."""
        value = self.value(column)
        if not isinstance(value, bool):
            raise DataError(
                f"{self.where}: column {column!r} must be true or false, got {kind(value)}; take a "
                "split whose answers are public, or mend the row"
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
                f"{self.where}: {what} holds half a surrogate pair, which is no character"
            ) from None
        return value.strip()


def kind(value: Any) -> str:
    """A value's type and its beginning, for messages."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} ({text if len(text) <= 40 else text[:37] + '...'})"
