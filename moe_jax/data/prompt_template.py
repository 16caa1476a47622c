"""Prompt templates: how an instruction and its input become the text before the answer.

A template is a text file. `{instruction}` and `{input}` stand for the row's fields; a brace that is
meant as such is written twice. Everything else is taken as it is, the last line break included. A
line `--- without input ---` ends the text for rows with an input; what follows it is the text for
rows without one. A template that never says `{input}` serves rows without input only.
"""

import string
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config.parse import suggest
from moe_jax.errors import DataError

SEPARATOR = "--- without input ---\n"
PLACEHOLDERS = ("instruction", "input")
FOLDER = Path(__file__).parent / "prompts"

# Literal text and the placeholder after it, in order.
Parts = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class PromptTemplate:
    """A parsed template.

    Attributes:
      path: the file, for messages.
      with_input: the text for rows that have an input.
      without_input: the text for rows that have none.
    """

    path: str
    with_input: Parts
    without_input: Parts

    def fill(self, instruction: str, material: str, where: str) -> str:
        """The prompt of one row, which stands at `where`; `material` is its input.

        Raises:
          DataError: the row has an input and the template has no place for it.
        """
        parts = self.with_input if material else self.without_input
        if material and not any(name == "input" for _, name in parts):
            raise DataError(f"{where}: has an input, and {self.path} has no place for {{input}}")
        values = {"instruction": instruction, "input": material, None: ""}
        return "".join(text + values[name] for text, name in parts)


def load_prompt_template(name: str) -> PromptTemplate:
    """The template of that name in `moe_jax/data/prompts/`, or else the file at that path.

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
        raise DataError(f"{path}: {error}; write a brace that is meant as such twice") from None
    for _, name, spec, conversion in parts:
        if name is not None and (name not in PLACEHOLDERS or spec or conversion):
            raise DataError(
                f"{path}: unknown placeholder {{{name}}}; {suggest(name, PLACEHOLDERS)}"
            )
    return tuple((literal, name) for literal, name, _, _ in parts)
