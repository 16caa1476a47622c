"""What a task is: a data set whose rows become questions with a few choices each."""

import abc
import dataclasses
import string
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from moe_jax.config.parse import Registry, require
from moe_jax.errors import DataError
from moe_jax.tasks.task_rows import HubData, TaskRow, read_hub, read_local

TASKS = Registry("task")

BETWEEN_SHOTS = "\n\n"


class Choice(NamedTuple):
    """One possible answer as a stretch of text.

    Attributes:
      context: what stands before it.
      continuation: the text whose likelihood is measured, with the blank in front of it.
    """

    context: str
    continuation: str


class Question(NamedTuple):
    """A row as text, for both ways of answering; see `protocols`.

    Attributes:
      where: the place of the row, for messages.
      preface: what stands once before the prompt and its shots.
      prompt: the question with its options, up to the place where a label follows.
      labels: what may follow there, one for each choice, without the blank in front of it; empty
        where the task has no labels.
      choices: what the options say, each after its own context.
      answer: the index of the right one.
      subject: the part of the task that it belongs to, if the task has parts.
    """

    where: str
    preface: str
    prompt: str
    labels: tuple[str, ...]
    choices: tuple[Choice, ...]
    answer: int
    subject: str = ""

    @property
    def whole_prompt(self) -> str:
        """What stands before a label."""
        return self.preface + self.prompt

    @property
    def label_texts(self) -> tuple[str, ...]:
        """What follows `whole_prompt` for each choice: the label with the blank in front of it."""
        return tuple(f" {label}" for label in self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A data set and how its rows are asked. Members are registered in `TASKS`.

    Attributes:
      path: a local file or folder with the rows; None takes them from the hub.
      split: None takes the one by which models are compared.
      limit: only so many of the first rows; None takes all.
      shots: answered examples in front of each question.
    """

    registry: ClassVar[Registry] = TASKS
    hub: ClassVar[HubData]

    path: str | None = None
    split: str | None = None
    limit: int | None = None
    shots: int = 0

    def __post_init__(self):
        require(self.path != "", "path", "is empty; name a file or a folder")
        require(self.limit is None or self.limit > 0, "limit", "must be positive")
        require(self.shots >= 0, "shots", "must not be negative")

    @property
    def name(self) -> str:
        """What results call it."""
        return self.registry.name_of(self)

    @abc.abstractmethod
    def question(self, row: TaskRow) -> Question:
        """A row as text, without shots.

        Raises:
          DataError: the row does not fit the task's schema.
        """

    def rows(self) -> list[TaskRow]:
        """The rows that are evaluated.

        Raises:
          DataError: the data cannot be read, or has no splits where one is asked for.
        """
        if self.path is not None and Path(self.path).expanduser().is_file():
            for field in ("split", "shots"):
                if getattr(self, field):
                    raise DataError(
                        f"task {self.name!r}: {self.path} is a single file, which has no splits; "
                        f"leave {field} out, or give a folder with a file for each split"
                    )
        return self._read(self.split or self.hub.split, self.limit)

    def questions(self) -> list[Question]:
        """All questions, with the shots in front of them.

        Raises:
          DataError: the data cannot be read, a row does not fit, or the shots are too few.
        """
        split = self.split or self.hub.split
        if self.shots and split == self.hub.shots_split:
            raise DataError(
                f"task {self.name!r}: shots are taken from the split {split!r}, which is the one "
                "to evaluate; set shots to 0 or take another split"
            )
        questions = [self.question(row) for row in self.rows()]
        if not self.shots:
            return questions
        shots: dict[str, list[Question]] = {question.subject: [] for question in questions}
        for row in self._read(self.hub.shots_split, None):
            shot = self.question(row)
            if len(shots.get(shot.subject, ())) < self.shots:
                shots.setdefault(shot.subject, []).append(shot)
        for question in questions:
            found = len(shots[question.subject])
            if found < self.shots:
                about = f" about {question.subject}" if question.subject else ""
                raise DataError(
                    f"task {self.name!r}: {self.shots} shots asked for, but the split "
                    f"{self.hub.shots_split!r} has {found}{about}; set shots to at most that"
                )
        return [with_shots(question, shots[question.subject]) for question in questions]

    def _read(self, split: str, limit: int | None) -> list[TaskRow]:
        if self.path is None:
            return read_hub(self.hub, split, limit)
        return read_local(Path(self.path), self.hub.config, split, limit)


def with_shots(question: Question, shots: Sequence[Question]) -> Question:
    """`question` after examples that are answered in the way in which it is asked."""
    labelled, told = [], []
    for shot in shots:
        if shot.labels:
            labelled.append(f"{shot.prompt} {shot.labels[shot.answer]}{BETWEEN_SHOTS}")
        right = shot.choices[shot.answer]
        told.append(f"{right.context}{right.continuation}{BETWEEN_SHOTS}")
    before = "".join(told)
    return question._replace(
        prompt="".join(labelled) + question.prompt,
        choices=tuple(Choice(before + c.context, c.continuation) for c in question.choices),
    )


# FIXME docstring of the merged tasks.options:
# """Questions whose options are listed under letters."""


LETTERS = tuple(string.ascii_uppercase)


def lettered(texts: Sequence[str]) -> str:
    """The options, one a line: `(A) first`."""
    return "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False))


def lettered_question(
    row: TaskRow,
    *,
    preface: str,
    stem: str,
    texts: Sequence[str],
    answer: int,
    subject: str = "",
    choices: tuple[Choice, ...] | None = None,
) -> Question:
    """A question that is answered by the letter of an option, or by the option's own words.

    Letters go by the options' order, whatever the data set itself calls them: some rows of ARC
    number theirs, and a digit is two tokens in Llama's tokenizer where a letter is one.

    Args:
      row: where the question comes from.
      preface: the instruction.
      stem: the question, the line before the options.
      texts: the options.
      answer: the index of the right one.
      subject: see `Question`.
      choices: what is scored by likelihood; by default each option after `stem` and `Answer:`.
    """
    if len(texts) > len(LETTERS):
        raise DataError(f"{row.where}: {len(texts)} options, of at most {len(LETTERS)}")
    if choices is None:
        choices = tuple(Choice(f"{stem}\nAnswer:", f" {text}") for text in texts)
    prompt = f"{stem}\n{lettered(texts)}\nAnswer:"
    labels = LETTERS[: len(texts)]
    return Question(row.where, preface, prompt, labels, choices, answer, subject)


def labelled_choices(row: TaskRow) -> tuple[tuple[str, ...], int]:
    """Texts and right index of a row with `choices` (`text`, `label`) and `answerKey`."""
    choices = row.group("choices")
    texts = choices.texts("text")
    labels = choices.texts("label", len(texts))
    if len(set(labels)) < len(labels):
        raise DataError(f"{choices.where}: column 'label' holds a label twice: {', '.join(labels)}")
    return texts, row.position("answerKey", labels)
