"""OpenBookQA: elementary science questions, each based on a fact (arXiv:1809.02789)."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Choice, Question, Task, labeled_choices, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Choose the option that answers the question or completes the sentence.\n\n"


@TASKS.register("openbookqa")
@dataclass(frozen=True, kw_only=True)
class OpenBookQA(Task):
    """OpenBookQA: 500 test questions of four options, without the fact."""

    hub: ClassVar[HubData] = HubData("allenai/openbookqa", "main", "test", "train")

    def question(self, row: TaskRow) -> Question:
        texts, answer = labeled_choices(row)
        stem = row.text("question_stem")
        return lettered_question(
            row,
            preface=PREFACE,
            stem=f"Question: {stem}",
            texts=texts,
            answer=answer,
            # Most stems are the beginning of a sentence.
            choices=tuple(Choice(stem, f" {text}") for text in texts),
        )
