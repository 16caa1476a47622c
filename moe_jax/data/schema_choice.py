"""Schema of a data set whose configuration leaves it out, from the columns of its first row."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from moe_jax.config.data import Schema, SourceConfig
from moe_jax.data.schema import FIELDS, OPTIONAL
from moe_jax.errors import DataError

TEXT_SCHEMAS: tuple[Schema, ...] = ("instruction", "completion", "chat", "text")
"""Schemas whose rows are text to continue."""

COLUMN_SCHEMAS: tuple[Schema, ...] = (*TEXT_SCHEMAS, "classification")
"""Schemas that columns can tell."""

_OTHER_NAMES = {"messages": "conversations"}
"""Second usual name of a field's column."""


def choose_schema(
    source: SourceConfig, columns: Sequence[str], where: str, schemas: Collection[Schema]
) -> SourceConfig:
    """The source with the only one of `schemas` whose fields are all among the columns.

    Args:
      source: data set; its `columns` name fields of the schema.
      columns: columns of the first row.
      where: file and row, for messages.
      schemas: schemas to choose from.

    Raises:
      DataError: no schema fits, or several do.
    """
    fitting = [
        named
        for schema in schemas
        if (named := _with_columns(replace(source, schema=schema), columns)) is not None
    ]
    if len(fitting) == 1:
        return fitting[0]
    found = f"{where}: the columns {', '.join(map(str, columns)) or '(none)'}"
    remedy = (
        "set `schema`, and `columns` for fields of other names (on the command line --schema and "
        "--column FIELD=NAME)"
    )
    if fitting:
        names = " and ".join(repr(one.schema) for one in fitting)
        raise DataError(f"{found} fit the schemas {names}; {remedy}")
    known = "; ".join(
        f"{schema}: {', '.join(field for field in FIELDS[schema] if field not in OPTIONAL)}"
        for schema in schemas
    )
    raise DataError(f"{found} fit no schema ({known}); {remedy}")


def _with_columns(source: SourceConfig, columns: Sequence[str]) -> SourceConfig | None:
    """The source with the columns of its schema's fields; None if one is missing."""
    assert source.schema is not None
    fields, named = FIELDS[source.schema], dict(source.columns)
    if any(field not in fields for field in named):
        return None
    for field in fields:
        other = _OTHER_NAMES.get(field)
        if field not in named and field not in columns and other in columns:
            named[field] = str(other)
        if named.get(field, field) not in columns and (field in named or field not in OPTIONAL):
            return None
    return replace(source, columns=named)
