"""HellaSwag: continuations of a scene or an instruction (arXiv:1905.07830)."""

import re
from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Choice, Question, Task, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Choose the ending that the text goes on with.\n\n"
LABELS = ("0", "1", "2", "3")


@TASKS.register("hellaswag")
@dataclass(frozen=True, kw_only=True)
class HellaSwag(Task):
    """HellaSwag: 10,042 validation texts of four endings; test answers are not public."""

    hub: ClassVar[HubData] = HubData("Rowan/hellaswag", None, "validation", "train")

    def question(self, row: TaskRow) -> Question:
        text = plain(f"{row.text('activity_label')}: {row.text('ctx')}")
        endings = tuple(plain(ending) for ending in row.texts("endings", len(LABELS)))
        return lettered_question(
            row,
            preface=PREFACE,
            stem=f"Text: {text}",
            texts=endings,
            answer=row.position("label", LABELS),
            choices=tuple(Choice(text, f" {ending}") for ending in endings),
        )


def plain(text: str) -> str:
    """Removes the marks of texts from WikiHow, such as `[header]`."""
    unmarked = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", unmarked).strip() or text
