"""BoolQ: yes/no questions from users of a search engine (arXiv:1905.10044).

The prompt leaves out the passage that the data set has for each question, as the reference does.
"""

from dataclasses import dataclass
from typing import ClassVar

from moe_jax.tasks.task import TASKS, Choice, Question, Task
from moe_jax.tasks.task_rows import HubData, TaskRow

PREFACE = "Say whether the answer to the question is true or false.\n\n"
LABELS = ("true", "false")
WORDS = ("yes", "no")


@TASKS.register("boolq")
@dataclass(frozen=True, kw_only=True)
class BoolQ(Task):
    """BoolQ: 3,270 validation questions; test answers are not public."""

    hub: ClassVar[HubData] = HubData("google/boolq", None, "validation", "train")

    def question(self, row: TaskRow) -> Question:
        prompt = f"Question: {row.text('question').rstrip('? ')}?\nAnswer:"
        choices = tuple(Choice(prompt, f" {word}") for word in WORDS)
        answer = 0 if row.flag("answer") else 1
        return Question(row.where, PREFACE, prompt, LABELS, choices, answer)
