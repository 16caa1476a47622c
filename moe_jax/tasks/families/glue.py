"""GLUE: eight of its nine tasks of classifying one or two texts (arXiv:1804.07461), without WNLI.

Adapters with a score head read the texts alone. Language models answer the questions below.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from moe_jax.config.classification import GLUE, GLUE_HUB_ID, ClassificationConfig, MetricName
from moe_jax.data.schema import label_number
from moe_jax.data.values import describe_value
from moe_jax.errors import DataError
from moe_jax.tasks.task import TASKS, Choice, Question, Task
from moe_jax.tasks.task_rows import HubData, TaskRow

SENTENCES = ("First sentence", "Second sentence")


class LabeledText(NamedTuple):
    """A row to classify.

    Attributes:
      where: file and line or row, for messages.
      text: text, or the first of two texts.
      text_pair: second text; empty if there is one text.
      label: class name, or number for regression.
    """

    where: str
    text: str
    text_pair: str
    label: str | float


@dataclass(frozen=True, kw_only=True)
class ClassificationTask(Task, abc.ABC):
    """A GLUE data set of texts with labels, in the hub's schema.

    Attributes:
      glue: name of the task in `moe_jax.config.classification.GLUE`.
      preface: instruction in a language model's prompt.
      captions: name of each text in the prompt.
      words: answer for each class in the prompt; empty for regression.
    """

    glue: ClassVar[str]
    preface: ClassVar[str]
    captions: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; empty for regression."""
        return GLUE[self.glue].labels

    @property
    def metrics(self) -> tuple[MetricName, ...]:
        """Metrics of the task."""
        return GLUE[self.glue].metrics

    def labeled(self, row: TaskRow) -> LabeledText:
        """Text and label of a row.

        Raises:
          DataError: the row does not fit the task's schema.
        """
        texts = [_text(row, column) for column in GLUE[self.glue].columns]
        classification = ClassificationConfig(labels=self.labels, regression=not self.labels)
        where = f"{row.where}: column 'label'"
        number = label_number(row.value("label"), classification, where)
        label = self.labels[int(number)] if self.labels else number
        return LabeledText(row.where, texts[0], texts[1] if len(texts) > 1 else "", label)

    def labeled_rows(self) -> list[LabeledText]:
        """Texts and labels of all rows of the split.

        Raises:
          DataError: the data cannot be read, a row does not fit, or `shots` is set.
        """
        if self.shots:
            raise DataError(
                f"task {self.name!r}: classifiers do not use few-shot examples; set shots to 0"
            )
        return [self.labeled(row) for row in self.rows()]

    def question(self, row: TaskRow) -> Question:
        if not self.words:
            raise DataError(
                f"task {self.name!r}: asks for a number, which only an adapter with "
                f"method.classification predicts; train one with glue={self.glue!r}"
            )
        labeled = self.labeled(row)
        assert isinstance(labeled.label, str)
        texts = (labeled.text, labeled.text_pair)
        lines = [f"{caption}: {text}" for caption, text in zip(self.captions, texts, strict=False)]
        prompt = "\n".join([*lines, "Answer:"])
        choices = tuple(Choice(prompt, f" {word}") for word in self.words)
        answer = self.labels.index(labeled.label)
        return Question(row.where, self.preface, prompt, self.words, choices, answer)


def _text(row: TaskRow, column: str) -> str:
    """Text of a column, possibly blank: a few rows of QQP have no second question."""
    value = row.value(column)
    if isinstance(value, str) and not value.strip():
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column {column!r} must be text, got {describe_value(value)}")
    return row.text(column)


def _hub(name: str, split: str = "validation") -> HubData:
    return HubData(GLUE_HUB_ID, name, split, "train")


@TASKS.register("cola")
@dataclass(frozen=True, kw_only=True)
class Cola(ClassificationTask):
    """CoLA: 1,043 validation sentences, grammatically acceptable or not."""

    hub: ClassVar[HubData] = _hub("cola")
    glue: ClassVar[str] = "cola"
    preface: ClassVar[str] = "Say whether the sentence is grammatical, no or yes.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("Sentence",)
    words: ClassVar[tuple[str, ...]] = ("no", "yes")


@TASKS.register("sst2")
@dataclass(frozen=True, kw_only=True)
class Sst2(ClassificationTask):
    """SST-2: 872 validation sentences of film reviews, negative or positive."""

    hub: ClassVar[HubData] = _hub("sst2")
    glue: ClassVar[str] = "sst2"
    preface: ClassVar[str] = "Say whether the film review is negative or positive.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("Review",)
    words: ClassVar[tuple[str, ...]] = ("negative", "positive")


@TASKS.register("mrpc")
@dataclass(frozen=True, kw_only=True)
class Mrpc(ClassificationTask):
    """MRPC: 408 validation pairs of sentences from the news, equivalent or not."""

    hub: ClassVar[HubData] = _hub("mrpc")
    glue: ClassVar[str] = "mrpc"
    preface: ClassVar[str] = "Say whether both sentences mean the same, no or yes.\n\n"
    captions: ClassVar[tuple[str, ...]] = SENTENCES
    words: ClassVar[tuple[str, ...]] = ("no", "yes")


@TASKS.register("qqp")
@dataclass(frozen=True, kw_only=True)
class Qqp(ClassificationTask):
    """QQP: 40,430 validation pairs of questions from a forum, duplicates or not."""

    hub: ClassVar[HubData] = _hub("qqp")
    glue: ClassVar[str] = "qqp"
    preface: ClassVar[str] = "Say whether both questions ask the same, no or yes.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("First question", "Second question")
    words: ClassVar[tuple[str, ...]] = ("no", "yes")


@TASKS.register("stsb")
@dataclass(frozen=True, kw_only=True)
class Stsb(ClassificationTask):
    """STS-B: 1,500 validation pairs of sentences, with a similarity from 0 to 5."""

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
    """MNLI matched: 9,815 validation pairs from the same kinds of text as in training."""

    hub: ClassVar[HubData] = _hub("mnli", "validation_matched")
    glue: ClassVar[str] = "mnli"


@TASKS.register("mnli_mismatched")
@dataclass(frozen=True, kw_only=True)
class MnliMismatched(_Entailment):
    """MNLI mismatched: 9,832 validation pairs from other kinds of text than in training."""

    hub: ClassVar[HubData] = _hub("mnli", "validation_mismatched")
    glue: ClassVar[str] = "mnli"


@TASKS.register("qnli")
@dataclass(frozen=True, kw_only=True)
class Qnli(ClassificationTask):
    """QNLI: 5,463 validation pairs of a question and a sentence that answers it or not."""

    hub: ClassVar[HubData] = _hub("qnli")
    glue: ClassVar[str] = "qnli"
    preface: ClassVar[str] = "Say whether the sentence answers the question, yes or no.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("Question", "Sentence")
    words: ClassVar[tuple[str, ...]] = ("yes", "no")


@TASKS.register("rte")
@dataclass(frozen=True, kw_only=True)
class Rte(ClassificationTask):
    """RTE: 277 validation pairs of a premise and a hypothesis, entailed or not."""

    hub: ClassVar[HubData] = _hub("rte")
    glue: ClassVar[str] = "rte"
    preface: ClassVar[str] = "Say whether the hypothesis follows from the premise, yes or no.\n\n"
    captions: ClassVar[tuple[str, ...]] = ("Premise", "Hypothesis")
    words: ClassVar[tuple[str, ...]] = ("yes", "no")
