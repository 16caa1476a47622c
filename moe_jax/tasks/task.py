"""Tasks: data sets whose rows become multiple-choice questions."""

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

SHOT_SEPARATOR = "\n\n"
"""Text after each answered example in front of a question."""


class Choice(NamedTuple):
    """One possible answer, scored by its likelihood.

    Attributes:
      context: text before the answer.
      continuation: text whose likelihood is scored, including the blank before it.
    """

    context: str
    continuation: str


class Question(NamedTuple):
    """A row as text, for both scoring protocols: by label, and by the text of each choice.

    Attributes:
      where: file and line or row, for messages.
      preface: instruction, once before the prompt and its shots.
      prompt: question with its options; a label follows it.
      labels: label of each choice, without the blank before it; empty if the task has no labels.
      choices: text of each choice with its context.
      answer: index of the right choice.
      subject: part of the task that the question belongs to; empty if the task has no parts.
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
        """Text before a label: preface and prompt."""
        return self.preface + self.prompt

    @property
    def label_texts(self) -> tuple[str, ...]:
        """Labels with the blank before them, as they follow `whole_prompt`."""
        return tuple(f" {label}" for label in self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A data set and its prompts. Members are registered in `TASKS`.

    Attributes:
      hub: data set on the hub, and its splits.
      path: local file or folder with the rows; None reads them from the hub.
      split: split to evaluate; None takes `hub.split`.
      limit: largest number of rows, from the start; None takes all.
      shots: number of answered examples in front of each question.
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
        """Name of the task in results."""
        return self.registry.name_of(self)

    @abc.abstractmethod
    def question(self, row: TaskRow) -> Question:
        """Converts a row to a question, without shots.

        Raises:
          DataError: the row does not fit the task's schema.
        """

    def rows(self) -> list[TaskRow]:
        """Reads the rows to evaluate.

        Raises:
          DataError: the data cannot be read, or is a single file and `split` or `shots` is set.
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
        """Reads all questions, with their shots.

        Raises:
          DataError: the data cannot be read, a row does not fit, or there are too few shots.
        """
        split = self.split or self.hub.split
        if self.shots and split == self.hub.shots_split:
            raise DataError(
                f"task {self.name!r}: shots are taken from the split {split!r}, which is the one "
                "to evaluate; set shots to 0 or use another split"
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
            available = len(shots[question.subject])
            if available < self.shots:
                about = f" about {question.subject}" if question.subject else ""
                raise DataError(
                    f"task {self.name!r}: shots is {self.shots}, but the split "
                    f"{self.hub.shots_split!r} has {available}{about}; set shots to at most that"
                )
        return [with_shots(question, shots[question.subject]) for question in questions]

    def _read(self, split: str, limit: int | None) -> list[TaskRow]:
        if self.path is None:
            return read_hub(self.hub, split, limit)
        return read_local(Path(self.path), self.hub.config, split, limit)


def with_shots(question: Question, shots: Sequence[Question]) -> Question:
    """Puts answered examples in front of a question's prompt and of each choice's context.

    Examples before the prompt are answered by label, those before a choice by the choice's text.
    """
    label_shots, choice_shots = [], []
    for shot in shots:
        if shot.labels:
            label_shots.append(f"{shot.prompt} {shot.labels[shot.answer]}{SHOT_SEPARATOR}")
        right = shot.choices[shot.answer]
        choice_shots.append(f"{right.context}{right.continuation}{SHOT_SEPARATOR}")
    before = "".join(choice_shots)
    return question._replace(
        prompt="".join(label_shots) + question.prompt,
        choices=tuple(Choice(before + c.context, c.continuation) for c in question.choices),
    )


LETTERS = tuple(string.ascii_uppercase)
"""Labels of lettered options."""


def lettered_options(texts: Sequence[str]) -> str:
    """Options with their letters, one per line: `(A) first`."""
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
    """A question with lettered options, answered by the letter or the text of an option.

    Letters follow the order of the options, whatever labels the data set has: some rows of ARC have
    numbers, and a digit is two tokens in Llama's tokenizer where a letter is one.

    Args:
      row: row of the question.
      preface: instruction.
      stem: question, on the line before the options.
      texts: text of each option.
      answer: index of the right option.
      subject: see `Question`.
      choices: choices scored by likelihood; by default each option after `stem` and `Answer:`.

    Raises:
      DataError: there are more options than letters.
    """
    if len(texts) > len(LETTERS):
        raise DataError(f"{row.where}: {len(texts)} options; at most {len(LETTERS)} are supported")
    if choices is None:
        choices = tuple(Choice(f"{stem}\nAnswer:", f" {text}") for text in texts)
    prompt = f"{stem}\n{lettered_options(texts)}\nAnswer:"
    labels = LETTERS[: len(texts)]
    return Question(row.where, preface, prompt, labels, choices, answer, subject)


def labeled_choices(row: TaskRow) -> tuple[tuple[str, ...], int]:
    """Texts and right index of a row with `choices` (`text`, `label`) and `answerKey`."""
    choices = row.group("choices")
    texts = choices.texts("text")
    labels = choices.texts("label", len(texts))
    if len(set(labels)) < len(labels):
        raise DataError(f"{choices.where}: column 'label' holds a label twice: {', '.join(labels)}")
    return texts, row.position("answerKey", labels)
