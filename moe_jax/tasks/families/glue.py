"""GLUE: eight of its nine tasks of understanding a text or two (arXiv:1804.07461), without WNLI.

A classification adapter sees the bare texts. A language model is asked in the words below.
"""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.config.glue import GLUE_HUB_ID
from moe_jax.tasks.classification import ClassificationTask
from moe_jax.tasks.sources import HubData
from moe_jax.tasks.task import TASKS

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
