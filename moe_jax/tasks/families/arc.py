"""ARC: grade-school science questions (arXiv:1803.05457)."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Question, Task, labeled_choices, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Choose the option that answers the science question.\n\n"


@dataclass(frozen=True, kw_only=True)
class _Arc(Task):
    def question(self, row: TaskRow) -> Question:
        texts, answer = labeled_choices(row)
        stem = f"Question: {row.text('question')}"
        return lettered_question(row, preface=PREFACE, stem=stem, texts=texts, answer=answer)


@TASKS.register("arc_easy")
@dataclass(frozen=True, kw_only=True)
class ArcEasy(_Arc):
    """ARC-Easy: 2,376 test questions of three to five options."""

    hub: ClassVar[HubData] = HubData("allenai/ai2_arc", "ARC-Easy", "test", "train")


@TASKS.register("arc_challenge")
@dataclass(frozen=True, kw_only=True)
class ArcChallenge(_Arc):
    """ARC-Challenge: 1,172 test questions that retrieval and word statistics do not answer."""

    hub: ClassVar[HubData] = HubData("allenai/ai2_arc", "ARC-Challenge", "test", "train")
