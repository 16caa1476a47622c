"""WinoGrande: the right one of two options for a blank in a sentence (arXiv:1907.10641)."""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.errors import DataError
from moe_jax.tasks.task import TASKS, Choice, Question, Task, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Choose the option that fills the blank, written as _, in the sentence.\n\n"
LABELS = ("1", "2")
BLANK = "_"


@TASKS.register("winogrande")
@dataclass(frozen=True, kw_only=True)
class WinoGrande(Task):
    """WinoGrande: 1,267 validation sentences, equal in all of its configurations.

    By likelihood, the options are compared by the text after the blank, with each option filled in
    (partial scoring, arXiv:1806.02847, section 3), since the likelihood of a name alone says
    nothing.
    """

    hub: ClassVar[HubData] = HubData(
        "allenai/winogrande", "winogrande_debiased", "validation", "train"
    )

    def question(self, row: TaskRow) -> Question:
        sentence = row.text("sentence")
        options = (row.text("option1"), row.text("option2"))
        before, blank, after = sentence.partition(BLANK)
        if not blank or not after.strip():
            raise DataError(
                f"{row.where}: column 'sentence' must have a blank ({BLANK}) with text after it"
            )
        return lettered_question(
            row,
            preface=PREFACE,
            stem=f"Sentence: {sentence}",
            texts=options,
            answer=row.position("answer", LABELS),
            choices=tuple(Choice(before + option, after) for option in options),
        )
