"""Tasks whose rows are one or two texts with a label, for adapters that classify.

A model without a score head is asked the same rows in words, as other tasks are.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from moe_jax.config.classification import GLUE, GLUE_HUB_ID, ClassificationConfig, MetricName
from moe_jax.data.schema import label_number
from moe_jax.errors import DataError
from moe_jax.tasks.task import TASKS, Choice, Question, Task
from moe_jax.tasks.task_rows import HubData, TaskRow, kind


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

    def labelled(self, row: TaskRow) -> LabelledText:
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

    def question(self, row: TaskRow) -> Question:
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


def _text(row: TaskRow, column: str) -> str:
    """A column's text, which may be blank: a few rows of QQP have no second question."""
    value = row.value(column)
    if isinstance(value, str) and not value.strip():
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} must be text, got {kind(value)}")
    return row.text(column)


# FIXME docstring of the merged tasks.families.glue:
# """GLUE: eight of its nine tasks of understanding a text or two (arXiv:1804.07461), without WNLI.
#
# A classification adapter sees the bare texts. A language model is asked in the words below.
# """


SENTENCES = ("First sentence", "Second sentence")


def _hub(name: str, split: str = "validation") -> HubData:
    return HubData(GLUE_HUB_ID, name, split, "train")


@TASKS.register("cola")
@dataclass(frozen=True, kw_only=True)
class Cola(ClassificationTask):
    """1,043 validation sentences, acceptable to a speaker of English or not."""

    hub: ClassVar[HubData] = _hub("cola")
    glue: ClassVar[str] = "cola"
    preface: ClassVar[str] = "Say whether the sentence is grammatical, no or yes.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("Sentence",)
    words: ClassVar[tuple[str, ...]] = ("no", "yes")


@TASKS.register("sst2")
@dataclass(frozen=True, kw_only=True)
class Sst2(ClassificationTask):
    """872 validation sentences of film reviews, negative or positive."""

    hub: ClassVar[HubData] = _hub("sst2")
    glue: ClassVar[str] = "sst2"
    preface: ClassVar[str] = "Say whether the film review is negative or positive.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("Review",)
    words: ClassVar[tuple[str, ...]] = ("negative", "positive")


@TASKS.register("mrpc")
@dataclass(frozen=True, kw_only=True)
class Mrpc(ClassificationTask):
    """408 validation pairs of sentences from the news, which say the same or not."""

    hub: ClassVar[HubData] = _hub("mrpc")
    glue: ClassVar[str] = "mrpc"
    preface: ClassVar[str] = "Say whether both sentences mean the same, no or yes.\n\n"
    captions: ClassVar[tuple[str, ...]] = SENTENCES
    words: ClassVar[tuple[str, ...]] = ("no", "yes")


@TASKS.register("qqp")
@dataclass(frozen=True, kw_only=True)
class Qqp(ClassificationTask):
    """40,430 validation pairs of questions from a forum, which ask the same or not."""

    hub: ClassVar[HubData] = _hub("qqp")
    glue: ClassVar[str] = "qqp"
    preface: ClassVar[str] = "Say whether both questions ask the same, no or yes.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("First question", "Second question")
    words: ClassVar[tuple[str, ...]] = ("no", "yes")


@TASKS.register("stsb")
@dataclass(frozen=True, kw_only=True)
class Stsb(ClassificationTask):
    """1,500 validation pairs of sentences, whose likeness is a number from 0 to 5."""

    hub: ClassVar[HubData] = _hub("stsb")
    glue: ClassVar[str] = "stsb"
    preface: ClassVar[str] = ""
    captions: ClassVar[tuple[str, ...]] = SENTENCES
    words: ClassVar[tuple[str, ...]] = ()


class _Entailment(ClassificationTask):
    preface: ClassVar[str] = (
        "Say whether the hypothesis follows from the premise: yes, maybe or no.\n\n"
    )
    captions: ClassVar[tuple[str, ...]] = ("Premise", "Hypothesis")
    words: ClassVar[tuple[str, ...]] = ("yes", "maybe", "no")


@TASKS.register("mnli")
@dataclass(frozen=True, kw_only=True)
class Mnli(_Entailment):
    """9,815 validation pairs from the kinds of text that training has too ("matched")."""

    hub: ClassVar[HubData] = _hub("mnli", "validation_matched")
    glue: ClassVar[str] = "mnli"


@TASKS.register("mnli_mismatched")
@dataclass(frozen=True, kw_only=True)
class MnliMismatched(_Entailment):
    """9,832 validation pairs from other kinds of text."""

    hub: ClassVar[HubData] = _hub("mnli", "validation_mismatched")
    glue: ClassVar[str] = "mnli"


@TASKS.register("qnli")
@dataclass(frozen=True, kw_only=True)
class Qnli(ClassificationTask):
    """5,463 validation pairs of a question and a sentence, which answers it or not."""

    hub: ClassVar[HubData] = _hub("qnli")
    glue: ClassVar[str] = "qnli"
    preface: ClassVar[str] = "Say whether the sentence answers the question, yes or no.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("Question", "Sentence")
    words: ClassVar[tuple[str, ...]] = ("yes", "no")


@TASKS.register("rte")
@dataclass(frozen=True, kw_only=True)
class Rte(ClassificationTask):
    """277 validation pairs of texts, the second of which follows from the first or not."""

    hub: ClassVar[HubData] = _hub("rte")
    glue: ClassVar[str] = "rte"
    preface: ClassVar[str] = "Say whether the hypothesis follows from the premise, yes or no.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("Premise", "Hypothesis")
    words: ClassVar[tuple[str, ...]] = ("yes", "no")
