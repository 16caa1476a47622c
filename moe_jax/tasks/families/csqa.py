"""CommonsenseQA: questions about everyday concepts (arXiv:1811.00937)."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Question, Task, labeled_choices, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Use common sense to choose the option that answers the question.\n\n"


@TASKS.register("csqa")
@dataclass(frozen=True, kw_only=True)
class CommonsenseQA(Task):
    """CommonsenseQA: 1,221 validation questions of five options; test answers are not public."""

    hub: ClassVar[HubData] = HubData("tau/commonsense_qa", None, "validation", "train")

    def question(self, row: TaskRow) -> Question:
        texts, answer = labeled_choices(row)
        stem = f"Question: {row.text('question')}"
        return lettered_question(row, preface=PREFACE, stem=stem, texts=texts, answer=answer)
