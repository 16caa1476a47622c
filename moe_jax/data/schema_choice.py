"""Schema of a data set whose configuration leaves it out, from the columns of its first row."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from moe_jax.config.data import PREFERENCE_SCHEMAS, Schema, SourceConfig
from moe_jax.config.parse import suggest
from moe_jax.config.preference import PREFERENCES
from moe_jax.data.schema import FIELDS, is_optional
from moe_jax.errors import DataError

TEXT_SCHEMAS: tuple[Schema, ...] = ("instruction", "completion", "chat", "text")
"""Schemas whose rows are text to continue."""

COLUMN_SCHEMAS: tuple[Schema, ...] = (*TEXT_SCHEMAS, "classification")
"""Schemas that columns can tell."""

_OTHER_NAMES: dict[str, tuple[str, tuple[Schema, ...]]] = {
    "messages": ("conversations", ("chat",)),
    "prompt": ("conversations", PREFERENCE_SCHEMAS),
}
"""Second usual name of a field's column, and the schemas of which it is."""


REMEDY = (
    "set `schema`, and `columns` for fields of other names (on the command line --schema and "
    "--column FIELD=NAME)"
)
"""Advice where the columns do not tell the schema."""


def choose_schema(
    source: SourceConfig,
    columns: Sequence[str],
    where: str,
    schemas: Collection[Schema],
    remedy: str = REMEDY,
) -> SourceConfig:
    """The source with the only one of `schemas` whose fields are all among the columns.

    Args:
      source: data set; its `columns` name fields of the schema.
      columns: columns of the first row.
      where: file and row, for messages.
      schemas: schemas to choose from.
      remedy: advice in the message.

    Raises:
      DataError: no schema fits, or several do.
    """
    fitting = [
        named
        for schema in schemas
        if (named := _with_columns(replace(source, schema=schema), columns)) is not None
    ]
    is_feedback = _with_columns(replace(source, schema="feedback"), columns) is not None
    if [one.schema for one in fitting] == ["completion"] and is_feedback:
        raise DataError(
            f"{where}: the columns {', '.join(columns)} fit the schema 'completion', which learns "
            "all completions whatever their label, and 'feedback', which --preference kto learns "
            "from; set `schema` (on the command line --schema), or give that loss"
        )
    if len(fitting) == 1:
        return fitting[0]
    found = f"{where}: the columns {', '.join(map(str, columns)) or '(none)'}"
    if fitting:
        names = " and ".join(repr(one.schema) for one in fitting)
        raise DataError(f"{found} fit the schemas {names}; {remedy}")
    for schema in PREFERENCE_SCHEMAS:
        if schema not in schemas and _with_columns(replace(source, schema=schema), columns):
            raise DataError(
                f"{found} are those of the schema {schema!r}; {_loss_advice(schema, schemas)}"
            )
    known_fields = set().union(*(FIELDS[schema] for schema in schemas))
    for field, name in source.columns.items():
        if field not in known_fields:
            raise DataError(
                f"{where}: `columns` (--column {field}={name}): no schema has a field {field!r}; "
                + suggest(field, known_fields)
            )
        if name and name not in columns:
            raise DataError(
                f"{found} do not include {name!r}, which `columns` (--column {field}={name}) names"
                "; give one of these"
            )
    known = "; ".join(
        f"{schema}: {', '.join(f for f in FIELDS[schema] if not is_optional(f, schema))}"
        for schema in schemas
    )
    raise DataError(f"{found} fit no schema ({known}); {remedy}")


def _loss_advice(schema: Schema, schemas: Collection[Schema]) -> str:
    """Advice on rows of a schema of preference data where `schemas` are learned."""
    losses = sorted(name for name, loss in PREFERENCES.items() if loss.schema == schema)
    listed = " or ".join(filter(None, [", ".join(losses[:-1]), losses[-1]]))
    advice = (
        f"an adapter learns from them with the preference loss {listed}, given by its "
        "field `preference` or --preference NAME"
    )
    if "feedback" in schemas:
        advice += (
            "; for 'kto', which learns from single answers, write each pair as two rows with "
            "prompt, completion and label"
        )
    return advice


def _with_columns(source: SourceConfig, columns: Sequence[str]) -> SourceConfig | None:
    """The source with the columns of its schema's fields; None if one is missing."""
    assert source.schema is not None
    fields, named = FIELDS[source.schema], dict(source.columns)
    if any(field not in fields for field in named):
        return None
    for field in fields:
        other, schemas = _OTHER_NAMES.get(field, ("", ()))
        has_other = source.schema in schemas and other in columns
        if field not in named and field not in columns and has_other:
            named[field] = other
        is_needed = bool(named.get(field)) or not is_optional(field, source.schema)
        if named.get(field, field) not in columns and is_needed:
            return None
    return replace(source, columns=named)
