"""Social IQa: reactions and intentions in social situations (arXiv:1904.09728)."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Question, Task, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Choose the option that answers the question about the situation.\n\n"
LABELS = ("1", "2", "3")


@TASKS.register("siqa")
@dataclass(frozen=True, kw_only=True)
class SocialIQA(Task):
    """Social IQa: 1,954 validation questions of three options."""

    # The authors' own `allenai/social_i_qa` is a script, and `datasets` no longer runs scripts.
    hub: ClassVar[HubData] = HubData("lighteval/siqa", None, "validation", "train")

    def question(self, row: TaskRow) -> Question:
        return lettered_question(
            row,
            preface=PREFACE,
            stem=f"Situation: {row.text('context')}\nQuestion: {row.text('question')}",
            texts=tuple(row.text(f"answer{letter}") for letter in "ABC"),
            answer=row.position("label", LABELS),
        )
