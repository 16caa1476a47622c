"""The directive `fields`: the fields of a configuration's dataclasses, from their docstrings.

    fields:: moe_jax.config.optimizer.OptimizerConfig
    fields:: moe_jax.adapters.ROUTERS

The second form, a registry, takes each of its members in turn, under the name that a configuration
gives. A field that has no entry in the docstrings of its class and their bases fails the build.
"""

import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from docstrings import with_literal_blocks
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SECTION = "Attributes:"
HEADINGS = ("Field", "Type", "Default", "Meaning")
WIDTHS = (20, 22, 13, 45)


class Fields(SphinxDirective):
    """A table of the fields of one dataclass, or of each member of a registry.

    Options:
      base: a base class whose fields the tables leave out; they have a table of their own.
    """

    required_arguments = 1
    option_spec: typing.ClassVar = {"base": str}

    def run(self) -> list[nodes.Node]:
        """Builds the tables."""
        found = load(self.arguments[0])
        base = load(self.options["base"]) if "base" in self.options else None
        if not isinstance(found, Mapping):
            return self.described(found, base)
        result: list[nodes.Node] = []
        for name in found:
            section = nodes.section(ids=[nodes.make_id(f"{self.arguments[0]}-{name}")])
            section += nodes.title("", "", nodes.literal(name, name))
            section += self.described(found[name], base)
            result.append(section)
        return result

    def described(self, cls: type, base: type | None) -> list[nodes.Node]:
        """The text of a class's docstring, and the table of its fields."""
        shown = self.parsed(summary(cls))
        left_out = {field.name for field in dataclasses.fields(base)} if base is not None else set()
        rows = [row for row in rows_of(cls, self) if row[0] not in left_out]
        if not rows:
            return [*shown, *self.parsed("No further fields.")]
        table = nodes.table(classes=["field-table"])
        group = nodes.tgroup(cols=len(HEADINGS))
        group += [nodes.colspec(colwidth=width) for width in WIDTHS]
        head, body = nodes.thead(), nodes.tbody()
        head += self.row([[nodes.paragraph("", text)] for text in HEADINGS])
        for name, kind, default, text in rows:
            literals = [[self.literal(cell)] for cell in (name, kind, default)]
            body += self.row([*literals, self.parsed(text)])
        group += [head, body]
        table += group
        return [*shown, table]

    def literal(self, text: str) -> nodes.Node:
        """A paragraph that is one piece of code."""
        return nodes.paragraph("", "", nodes.literal(text, text)) if text else nodes.paragraph()

    def row(self, cells: list[list[nodes.Node]]) -> nodes.row:
        """A row of a table."""
        row = nodes.row()
        for cell in cells:
            row += nodes.entry("", *cell)
        return row

    def parsed(self, text: str) -> list[nodes.Node]:
        """Nodes of a docstring's text, which is reST but for indented blocks of code."""
        lines = with_literal_blocks(text.splitlines())
        container = nodes.Element()
        self.state.nested_parse(StringList(lines, source=self.arguments[0]), 0, container)
        return container.children


def load(path: str) -> Any:
    """The object with this dotted path, `package.module.NAME`."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def summary(cls: type) -> str:
    """The class's own docstring up to its first section."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return re.split(rf"^(?:{SECTION}|Raises:|Args:)$", text, maxsplit=1, flags=re.MULTILINE)[0]


def entries(cls: type) -> Iterator[tuple[str, str]]:
    """Names and texts of the section `Attributes:` of the class's own docstring."""
    text = inspect.cleandoc(cls.__doc__ or "")
    _, found, section = text.partition(f"\n{SECTION}\n")
    if not found:
        return
    lines = section.splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    for entry in re.split(r"^(?=\S)", textwrap.dedent("\n".join(lines[:end])), flags=re.MULTILINE):
        names, colon, meaning = entry.partition(":")
        if colon:
            first, _, more = meaning.strip().partition("\n")
            for name in names.split(","):
                yield name.strip(), f"{first}\n{textwrap.dedent(more)}"


def rows_of(cls: type, directive: SphinxDirective) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field, those of the class itself first."""
    texts = {name: text for ancestor in reversed(cls.__mro__) for name, text in entries(ancestor)}
    own = vars(cls).get("__annotations__", {})
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in own):
        if field.name not in texts:
            raise directive.error(f"{cls.__qualname__}.{field.name}: has no entry in {SECTION}")
        yield field.name, type_name(field.type), default_of(field), texts[field.name]


def type_name(kind: Any) -> str:
    """A type as code, without modules."""
    text = inspect.formatannotation(kind) if not isinstance(kind, str) else kind
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
    if text.startswith("Literal["):
        text = " | ".join(repr(choice) for choice in typing.get_args(kind)) or text
    return text


def default_of(field: dataclasses.Field) -> str:
    """A field's default as code, empty where there is none."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)


def setup(app: Sphinx) -> dict[str, Any]:
    """Enters the directive."""
    app.add_directive("fields", Fields)
    return {"parallel_read_safe": True}
