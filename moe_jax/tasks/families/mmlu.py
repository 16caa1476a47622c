"""MMLU: exam questions from 57 subjects (arXiv:2009.03300)."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Question, Task, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Choose the right option for each question about {subject}.\n\n"
LABELS = ("0", "1", "2", "3")


@TASKS.register("mmlu")
@dataclass(frozen=True, kw_only=True)
class Mmlu(Task):
    """MMLU: 14,042 test questions of four options, with five shots of the same subject.

    The accuracy is over all questions; results have that of each subject too.
    """

    hub: ClassVar[HubData] = HubData("cais/mmlu", "all", "test", "dev")

    shots: int = 5

    def question(self, row: TaskRow) -> Question:
        subject = row.text("subject").replace("_", " ")
        return lettered_question(
            row,
            preface=PREFACE.format(subject=subject),
            stem=f"Question: {row.text('question')}",
            texts=row.texts("choices", len(LABELS)),
            answer=row.position("answer", LABELS),
            subject=subject,
        )
