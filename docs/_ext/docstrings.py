"""Reads indented blocks of docstrings as code, as Markdown does; reST reads quotations."""

from typing import Any

from sphinx.application import Sphinx

INDENT = 4


def with_literal_blocks(lines: list[str]) -> list[str]:
    """The lines of a docstring, with `::` before each block that is indented by four spaces.

    A block follows a blank line and stands at least `INDENT` spaces deeper than the line before it.
    """
    result: list[str] = []
    outer = 0
    inside = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            result.append(line)
            continue
        after_blank = bool(result) and not result[-1].strip()
        if inside and indent < outer + INDENT:
            inside = False
        if not inside and after_blank and indent >= outer + INDENT:
            result += [" " * outer + "::", ""]
            inside = True
        if not inside:
            outer = indent
        result.append(line)
    return result


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Handler of `autodoc-process-docstring`."""
    lines[:] = with_literal_blocks(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Runs before napoleon, which has priority 500."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True}
