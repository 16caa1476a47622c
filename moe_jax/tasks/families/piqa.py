"""PIQA: the better of two solutions in the physical world (arXiv:1911.11641)."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Choice, Question, Task, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Choose the solution that reaches the goal.\n\n"
LABELS = ("0", "1")


@TASKS.register("piqa")
@dataclass(frozen=True, kw_only=True)
class Piqa(Task):
    """PIQA: 1,838 validation goals; test answers are not public."""

    # The authors' own `ybisk/piqa` is a script, and `datasets` no longer runs scripts.
    hub: ClassVar[HubData] = HubData("baber/piqa", None, "validation", "train")

    def question(self, row: TaskRow) -> Question:
        stem = f"Goal: {row.text('goal')}"
        solutions = (row.text("sol1"), row.text("sol2"))
        return lettered_question(
            row,
            preface=PREFACE,
            stem=stem,
            texts=solutions,
            answer=row.position("label", LABELS),
            choices=tuple(Choice(f"{stem}\nSolution:", f" {text}") for text in solutions),
        )
