"""Tasks whose rows are one or two texts with a label, for adapters that classify.

A model without a score head is asked the same rows in words, as other tasks are.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.glue import GLUE, MetricName
from moe_jax.data.labels import label_number
from moe_jax.errors import DataError
from moe_jax.tasks.rows import Row, kind
from moe_jax.tasks.task import Choice, Question, Task


class LabelledText(NamedTuple):
    """A row that is to be classified.

    Attributes:
      where: the place of the row, for messages.
      text: the text, or the first of two.
      text_pair: the second; empty where there is one.
      label: the name of its class, or its number.
    """

    where: str
    text: str
    text_pair: str
    label: str | float


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task, abc.ABC):
    """A data set of texts with labels, in the hub's schema.

    Attributes:
      glue: which task of GLUE it is.
      preface: what a language model is asked, once before the texts.
      captions: what stands before each text there.
      words: what the classes are called there; none where no words can answer.
    """

    glue: ClassVar[str]
    preface: ClassVar[str]
    captions: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; none where the label is a number."""
        return GLUE[self.glue].labels

    @property
    def metrics(self) -> tuple[MetricName, ...]:
        """What is measured."""
        return GLUE[self.glue].metrics

    def labelled(self, row: Row) -> LabelledText:
        """A row as text and label.

        Raises:
          DataError: the row does not fit the task's schema.
        """
        texts = [_text(row, column) for column in GLUE[self.glue].columns]
        classification = ClassificationConfig(labels=self.labels, regression=not self.labels)
        where = f"{row.where}: column 'label'"
        number = label_number(row.value("label"), classification, where)
        label = self.labels[int(number)] if self.labels else number
        return LabelledText(row.where, texts[0], texts[1] if len(texts) > 1 else "", label)

    def labelled_rows(self) -> list[LabelledText]:
        """All rows of the split.

        Raises:
          DataError: the data cannot be read, or a row does not fit.
        """
        if self.shots:
            raise DataError(f"task {self.name!r}: a classifier sees no shots; set shots to 0")
        return [self.labelled(row) for row in self.rows()]

    def question(self, row: Row) -> Question:
        if not self.words:
            raise DataError(
                f"task {self.name!r}: asks for a number, which only an adapter with "
                f"method.classification predicts; train one with glue={self.glue!r}"
            )
        labelled = self.labelled(row)
        assert isinstance(labelled.label, str)
        texts = (labelled.text, labelled.text_pair)
        lines = [f"{caption}: {text}" for caption, text in zip(self.captions, texts, strict=False)]
        prompt = "\n".join([*lines, "Answer:"])
        choices = tuple(Choice(prompt, f" {word}") for word in self.words)
        answer = self.labels.index(labelled.label)
        return Question(row.where, self.preface, prompt, self.words, choices, answer)


def _text(row: Row, column: str) -> str:
    """A column's text, which may be blank: a few rows of QQP have no second question."""
    value = row.value(column)
    if isinstance(value, str) and not value.strip():
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} must be text, got {kind(value)}")
    return row.text(column)
