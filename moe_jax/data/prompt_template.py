"""Prompt templates, which turn an instruction and its input into the text before the answer.

A template is a text file. `{instruction}` and `{input}` stand for the row's fields; a literal brace
is written twice. All other text is taken verbatim, including the last line break. A line
`--- without input ---` ends the text for rows with an input; the text after it is for rows without
one. A template without `{input}` fits only rows without an input.
"""

import string
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config.parse import suggest
from moe_jax.errors import DataError

SEPARATOR = "--- without input ---\n"
PLACEHOLDERS = ("instruction", "input")
FOLDER = Path(__file__).parent / "prompts"

# Pairs (literal text, placeholder after it or None), in order.
Parts = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class PromptTemplate:
    """A parsed template.

    Attributes:
      path: template file, for messages.
      with_input: text for rows that have an input.
      without_input: text for rows that have no input.
    """

    path: str
    with_input: Parts
    without_input: Parts

    def fill(self, instruction: str, input_text: str, where: str) -> str:
        """Prompt of one row.

        Args:
          instruction: the row's instruction.
          input_text: the row's input; empty if it has none.
          where: file and row, for messages.

        Raises:
          DataError: the row has an input and the template has no `{input}`.
        """
        parts = self.with_input if input_text else self.without_input
        if input_text and not any(name == "input" for _, name in parts):
            raise DataError(f"{where}: has an input, and {self.path} has no place for {{input}}")
        values = {"instruction": instruction, "input": input_text, None: ""}
        return "".join(text + values[name] for text, name in parts)


def load_prompt_template(name: str) -> PromptTemplate:
    """Loads the template `name` from `moe_jax/data/prompts/`, or else from the file at that path.

    Raises:
      DataError: there is no such template, or it does not parse.
    """
    known = sorted(file.stem for file in FOLDER.glob("*.txt"))
    path = FOLDER / f"{name}.txt" if name in known else Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"prompt {name!r}: no such file or template of this package; {suggest(name, known)}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    with_input, separator, without_input = text.partition(SEPARATOR)
    first = _parse(with_input, path)
    second = _parse(without_input, path) if separator else first
    for parts in (first, second):
        if not any(name == "instruction" for _, name in parts):
            raise DataError(f"{path}: has no place for {{instruction}}")
    if separator and any(name == "input" for _, name in second):
        raise DataError(f"{path}: uses {{input}} after the line {SEPARATOR.strip()!r}")
    return PromptTemplate(str(path), first, second)


def _parse(text: str, path: Path) -> Parts:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{path}: {error}; write a literal brace twice") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name not in PLACEHOLDERS or spec or conversion):
            raise DataError(
                f"{path}: unknown placeholder {{{name}}}; {suggest(name, PLACEHOLDERS)}"
            )
    return tuple((literal, name) for literal, name, _, _ in parts)
