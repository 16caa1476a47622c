"""Tasks from a template: a file of rows, and a text file with their prompt.

The text file has up to three sections:

    Read the passage and answer.

    {passage}

    Question: {question}
    {options}
    Answer:
    --- choices ---
    {first}
    {second}
    --- answer ---
    {solution}

The first section is the prompt. `{passage}` stands for the row's column of that name; a literal
brace is written twice. A line `{options}` lists the choices under letters, which are then the
labels; for scoring the choices by likelihood, that line is removed from the prompt.

The second section has one choice per line. A line that is a single column whose value is a list
stands for all of its items. The default is `{choices}`. Choices without a column, such as yes and
no, are the labels of a prompt that has no line `{options}`.

The third section gives the right choice: its text, its letter, or, as a number in the data, its
index from 0. The default is `{answer}`. Line breaks at the end of a section are dropped.

A folder with a file `template.txt`, and with rows in files named after their split (`train.jsonl`,
`test.jsonl`), is a task with the folder's name.
"""

import functools
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from moe_jax.config.parse import require
from moe_jax.data.values import describe_value
from moe_jax.errors import DataError
from moe_jax.tasks.task import LETTERS, TASKS, Choice, Question, Task, lettered_options
from moe_jax.tasks.task_rows import HubData, TaskRow

SECTIONS = ("choices", "answer")
OPTIONS_LINE = "{options}"
TEMPLATE_FILE = "template.txt"


class Template(NamedTuple):
    """A parsed template file.

    Attributes:
      prompt: text before the answer.
      choices: a template for each choice, or one that names a column with a list.
      answer: template of the right choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: str


@TASKS.register("template")
@dataclass(frozen=True, kw_only=True)
class TemplateTask(Task):
    """Rows from `path` with the prompts of a template file.

    Its name is that of the file, or of its folder if the file is `template.txt`.

    Attributes:
      template: template file; see this module.
      shots_split: split of a folder that shots are taken from.
    """

    template: str
    shots_split: str = "train"
    hub: ClassVar[HubData]  # holds the splits alone; rows come from `path`

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.path), "path", "a task from a template needs a local file or folder")
        object.__setattr__(self, "hub", HubData("", None, "test", self.shots_split))

    @property
    def name(self) -> str:
        file = Path(self.template).expanduser().absolute()
        return file.parent.name if file.name == TEMPLATE_FILE else file.stem

    @functools.cached_property
    def parsed(self) -> Template:
        """Parsed template file; raises `DataError` if it is invalid."""
        return load_template(Path(self.template).expanduser())

    def question(self, row: TaskRow) -> Question:
        template = self.parsed
        texts = _choices(template.choices, row)
        lines = template.prompt.split("\n")
        plain = _fill("\n".join(line for line in lines if line != OPTIONS_LINE), row)
        choices = tuple(Choice(plain, f" {text}") for text in texts)
        labels: tuple[str, ...] = ()
        prompt = plain
        if OPTIONS_LINE in lines:
            labels = LETTERS[: len(texts)]
            filled = {"options": lettered_options(texts)}
            prompt = _fill(template.prompt, row, filled)
        elif not any(_columns(choice) for choice in template.choices):
            labels = texts
        answer = _answer(template.answer, row, texts)
        return Question(row.where, "", prompt, labels, choices, answer)


def load_template(path: Path) -> Template:
    """Reads and checks a template file.

    Raises:
      DataError: the file cannot be read, or a section or placeholder is invalid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such task template") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None
    prompt, *rest = re.split(r"^--- *(\w+) *---[ \t]*$", text, flags=re.MULTILINE)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    for name in rest[::2]:
        if name not in SECTIONS or rest[::2].count(name) > 1:
            problem = "is given twice" if name in SECTIONS else "is unknown"
            raise DataError(f"{path}: the section {name!r} {problem}; known: {', '.join(SECTIONS)}")
    choices = [line.strip() for line in sections.get("choices", "{choices}").strip().split("\n")]
    template = Template(prompt.rstrip(), tuple(choices), sections.get("answer", "{answer}").strip())
    if not template.prompt or "" in choices or not template.answer:
        raise DataError(f"{path}: a section, or a line of the choices, is empty")
    for line in choices:
        if choices.count(line) > 1:
            raise DataError(f"{path}: the line {line!r} of the choices is given twice; remove one")
    try:
        for line in (template.prompt, *choices, template.answer):
            _columns(line)
    except ValueError as error:
        raise DataError(f"{path}: {error}; write a literal brace twice") from None
    lines = template.prompt.split("\n")
    if lines.count(OPTIONS_LINE) != template.prompt.count(OPTIONS_LINE) or (
        lines.count(OPTIONS_LINE) > 1
    ):
        raise DataError(f"{path}: {OPTIONS_LINE} must be a line by itself, and be given once")
    return template


def _columns(template: str) -> list[str]:
    """Placeholders of a template; raises ValueError if it does not parse."""
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.strip() or name != name.strip() or spec or conversion:
            raise ValueError(f"a placeholder is {{column}} and nothing else, not {{{name}...}}")
        names.append(name)
    return names


def _fill(template: str, row: TaskRow, extra: Mapping[str, str] | None = None) -> str:
    filled = []
    for literal, name, _, _ in string.Formatter().parse(template):
        filled.append(literal)
        if name is not None:
            known = extra is not None and name in extra
            filled.append(extra[name] if extra is not None and known else _text(row, name))
    return "".join(filled)


def _text(row: TaskRow, column: str) -> str:
    value = row.value(column)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else row.text(column)


def _choices(templates: tuple[str, ...], row: TaskRow) -> tuple[str, ...]:
    texts: list[str] = []
    for template in templates:
        value = _lone_value(template, row)
        if isinstance(value, list):
            texts += row.texts(template[1:-1])
        else:
            texts.append(_fill(template, row))
    if len(texts) < 2 or len(texts) > len(LETTERS):
        raise DataError(f"{row.where}: {len(texts)} choices, but 2 to {len(LETTERS)} are required")
    for text in texts:
        if texts.count(text) > 1:
            same = [str(number) for number, other in enumerate(texts, 1) if other == text]
            raise DataError(
                f"{row.where}: the choices {' and '.join(same)} are equal ({text!r}); make them "
                "differ, or remove the row"
            )
    return tuple(texts)


def _answer(template: str, row: TaskRow, texts: tuple[str, ...]) -> int:
    value = _lone_value(template, row)
    if type(value) is int:
        if 0 <= value < len(texts):
            return value
        raise DataError(
            f"{row.where}: the answer is {value}, not an index from 0 to {len(texts) - 1}"
        )
    if isinstance(value, bool):
        text = str(value).lower()
    else:
        text = _fill(template, row)
    if texts.count(text) == 1:
        return texts.index(text)
    letters = LETTERS[: len(texts)]
    if text in letters and text not in texts:
        return letters.index(text)
    raise DataError(
        f"{row.where}: the answer is {describe_value(text)}; it must be the text of one choice "
        f"({', '.join(texts)}), its letter, or its index from 0 as a number"
    )


def _lone_value(template: str, row: TaskRow) -> Any:
    """Value of the column that is the full template; None if the template has other text."""
    names = _columns(template)
    return row.value(names[0]) if names and template == f"{{{names[0]}}}" else None
