"""Results of one model on one task: accuracies and other metrics, with standard errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
      correct: number of right answers.
      questions: number of questions, at least one.
    """

    correct: int
    questions: int

    @property
    def value(self) -> float:
        """Share of right answers."""
        return self.correct / self.questions

    @property
    def standard_error(self) -> float | None:
        """Standard error of a binomial proportion: the square root of p (1 - p) / n.

        None if all answers are right or all are wrong: the formula then gives 0 for any number of
        questions, also for one.
        """
        return math.sqrt(self.value * (1.0 - self.value) / self.questions) or None

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "correct": self.correct,
            "questions": self.questions,
            "accuracy": self.value,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True)
class MetricScore:
    """Metric that is not a share of right answers, such as a correlation.

    Attributes:
      value: at most 1.
      standard_error: see `tasks.classification_metrics`.
      questions: number of rows.
    """

    value: float
    standard_error: float | None
    questions: int

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "questions": self.questions,
            "value": self.value,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True)
class TaskOutcome:
    """Results of one model on one task with one protocol.

    Attributes:
      model: name of the model.
      task: name of the task.
      protocol: name of the protocol.
      accuracies: accuracies by measure; classification tasks have other metrics too.
      subjects: accuracies by measure and subject, for tasks with subjects.
      examples: answer to each question, in the order of the data.
    """

    model: str
    task: str
    protocol: str
    accuracies: Mapping[str, Accuracy | MetricScore]
    subjects: Mapping[str, Mapping[str, Accuracy]]
    examples: Sequence[Mapping[str, Any]]

    def to_plain(self) -> dict[str, Any]:
        """Plain JSON values of everything except the examples."""
        measures = {}
        for measure, accuracy in self.accuracies.items():
            measures[measure] = accuracy.to_plain()
            if measure in self.subjects:
                measures[measure]["subjects"] = {
                    name: subject.to_plain() for name, subject in self.subjects[measure].items()
                }
        return {
            "model": self.model,
            "task": self.task,
            "protocol": self.protocol,
            "measures": measures,
        }


def count_correct(
    model: str, task: str, protocol: str, measures: Sequence[str], examples: Sequence[Mapping]
) -> TaskOutcome:
    """Counts the right answers of a model.

    Args:
      model, task, protocol: names, as in `TaskOutcome`.
      measures: names of the measures.
      examples: mappings with `answer`, `picked` (by measure) and `subject`.
    """
    by_subject: dict[str, list[Mapping]] = {}
    for example in examples:
        by_subject.setdefault(example["subject"], []).append(example)
    subjects = {}
    if set(by_subject) != {""}:
        subjects = {
            measure: {
                name: _accuracy(measure, subject_examples)
                for name, subject_examples in sorted(by_subject.items())
            }
            for measure in measures
        }
    accuracies = {measure: _accuracy(measure, examples) for measure in measures}
    return TaskOutcome(model, task, protocol, accuracies, subjects, examples)


def _accuracy(measure: str, examples: Sequence[Mapping]) -> Accuracy:
    correct = sum(example["picked"][measure] == example["answer"] for example in examples)
    return Accuracy(correct, len(examples))
