"""PubMedQA: questions about abstracts of medical papers (arXiv:1909.06146)."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Choice, Question, Task
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Answer the medical question by the abstract: yes, no or maybe.\n\n"
LABELS = ("yes", "no", "maybe")


@TASKS.register("pubmedqa")
@dataclass(frozen=True, kw_only=True)
class PubMedQA(Task):
    """PubMedQA: 1,000 expert-labeled questions, with the abstract except its conclusion.

    All of them are in one split, called train on the hub, so there is no other split for shots.
    """

    hub: ClassVar[HubData] = HubData("qiaojin/PubMedQA", "pqa_labeled", "train", "train")

    def question(self, row: TaskRow) -> Question:
        context = row.group("context")
        parts = context.texts("contexts")
        names = context.texts("labels", len(parts))
        abstract = "\n".join(f"{name}: {part}" for name, part in zip(names, parts, strict=True))
        prompt = f"{abstract}\n\nQuestion: {row.text('question')}\nAnswer:"
        choices = tuple(Choice(prompt, f" {label}") for label in LABELS)
        answer = row.position("final_decision", LABELS)
        return Question(row.where, PREFACE, prompt, LABELS, choices, answer)
