"""Counts, accuracies and their errors, as data and as tables."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError
from moe_jax.files.atomic import write_atomic
from moe_jax.version import __version__

RESULTS = "results.json"

MEANINGS = {
    "label_acc": "the label that the model finds likeliest after a prompt that lists the options",
    "acc": "the option whose words the model finds likeliest after the question",
    "acc_norm": "the same, log-likelihoods divided by the options' number of characters",
    "accuracy": "the class with the highest score of a score head",
    "f1": "the harmonic mean of precision and recall of the second class",
    "matthews": "Matthews' correlation of classes",
    "pearson": "the linear correlation of numbers",
    "spearman": "the correlation of their ranks",
}
"""What each measure calls the model's answer."""


@dataclass(frozen=True)
class Accuracy:
    """So many right answers.

    Attributes:
      correct: how many.
      questions: out of how many; at least one.
    """

    correct: int
    questions: int

    @property
    def value(self) -> float:
        """The share of right answers."""
        return self.correct / self.questions

    @property
    def standard_error(self) -> float:
        """Of a binomial share: the square root of p (1 - p) / n."""
        return math.sqrt(self.value * (1.0 - self.value) / self.questions)

    def to_plain(self) -> dict[str, Any]:
        """Counts and what follows from them."""
        return {
            "correct": self.correct,
            "questions": self.questions,
            "accuracy": self.value,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True)
class Metric:
    """What is not a share of right answers.

    Attributes:
      value: up to 1.
      standard_error: see `tasks.metrics`.
      questions: over how many rows.
    """

    value: float
    standard_error: float
    questions: int

    def to_plain(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "questions": self.questions,
            "value": self.value,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True)
class TaskOutcome:
    """One model on one task, asked one way.

    Attributes:
      model: what the user calls it.
      task: its name.
      protocol: how it was asked.
      accuracies: by measure; a classification task has other metrics too.
      subjects: by measure and part of the task, if it has parts.
      examples: what the model said about each question, in the order of the data.
    """

    model: str
    task: str
    protocol: str
    accuracies: Mapping[str, Accuracy | Metric]
    subjects: Mapping[str, Mapping[str, Accuracy]]
    examples: Sequence[Mapping[str, Any]]


def require_nothing_lost(folder: Path, tasks: Sequence[str], models: Sequence[str]) -> None:
    """Refuses a folder whose results tell of more than would be told in their place.

    Args:
      folder: where the results go; need not exist.
      tasks: what will be asked.
      models: who will be asked.

    Raises:
      ConfigError: earlier results would be lost.
    """
    file = folder / RESULTS
    if not file.exists():
        return
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        kinds = {"tasks": tasks, "models": models}
        former = {kind: [one["name"] for one in said[kind]] for kind in kinds}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{file}: is not of an evaluation; give another output") from None
    for kind, names in kinds.items():
        lost = [name for name in former[kind] if name not in names]
        if lost:
            raise ConfigError(
                f"{file}: holds {kind} that are not asked now, and would be written anew without "
                f"them: {', '.join(lost)}; ask for these too, or give another output"
            )


def outcome(
    model: str, task: str, protocol: str, measures: Sequence[str], examples: Sequence[Mapping]
) -> TaskOutcome:
    """Counts the right answers.

    Args:
      model, task, protocol, measures: see `TaskOutcome`.
      examples: each with `answer`, `picked` (by measure) and `subject`.
    """
    by_subject: dict[str, list[Mapping]] = {}
    for example in examples:
        by_subject.setdefault(example["subject"], []).append(example)
    subjects = {}
    if set(by_subject) != {""}:
        subjects = {
            measure: {name: _accuracy(measure, own) for name, own in sorted(by_subject.items())}
            for measure in measures
        }
    accuracies = {measure: _accuracy(measure, examples) for measure in measures}
    return TaskOutcome(model, task, protocol, accuracies, subjects, examples)


def _accuracy(measure: str, examples: Sequence[Mapping]) -> Accuracy:
    correct = sum(example["picked"][measure] == example["answer"] for example in examples)
    return Accuracy(correct, len(examples))


@dataclass(frozen=True)
class Evaluation:
    """What came of an evaluation.

    Attributes:
      settings: what was evaluated and how; plain JSON values.
      outcomes: for each model, task and protocol.
    """

    settings: Mapping[str, Any]
    outcomes: Sequence[TaskOutcome]
    models: Sequence[str] = field(init=False)
    tasks: Sequence[str] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "models", list(dict.fromkeys(o.model for o in self.outcomes)))
        object.__setattr__(self, "tasks", list(dict.fromkeys(o.task for o in self.outcomes)))

    def accuracy(self, model: str, task: str, measure: str) -> Accuracy | Metric | None:
        """One cell of the table; None where the task is not measured that way."""
        for one in self.outcomes:
            if (one.model, one.task) == (model, task) and measure in one.accuracies:
                return one.accuracies[measure]
        return None

    def shares(self, model: str) -> dict[str, Accuracy | Metric]:
        """All accuracies of a model, by `task/measure`."""
        return {
            f"{one.task}/{measure}": accuracy
            for one in self.outcomes
            if one.model == model
            for measure, accuracy in one.accuracies.items()
        }

    def average(self, model: str, measure: str) -> tuple[float, float] | None:
        """The mean over all tasks, each counting the same, and its standard error.

        None where a task is not measured that way.
        """
        cells = [self.accuracy(model, task, measure) for task in self.tasks]
        known = [cell for cell in cells if cell is not None]
        if len(known) < len(cells):
            return None
        variance = sum(cell.standard_error**2 for cell in known)
        return sum(cell.value for cell in known) / len(known), math.sqrt(variance) / len(known)

    def measures(self) -> list[str]:
        """All that was measured, in the order of `MEANINGS`."""
        found = {measure for one in self.outcomes for measure in one.accuracies}
        return [*(m for m in MEANINGS if m in found), *sorted(found - set(MEANINGS))]

    def to_plain(self) -> dict[str, Any]:
        """Everything but the examples, as plain JSON values."""
        averages = []
        for model in self.models:
            for measure in self.measures():
                mean = self.average(model, measure)
                if mean is not None:
                    averages.append(
                        {
                            "model": model,
                            "measure": measure,
                            "accuracy": mean[0],
                            "standard_error": mean[1],
                        }
                    )
        return {
            "moe_jax": __version__,
            **self.settings,
            "results": [_outcome_to_plain(one) for one in self.outcomes],
            "averages": averages,
        }

    def to_markdown(self) -> str:
        """A table for each measure: tasks as columns, models as rows."""
        tables = [self._table(measure) for measure in self.measures()]
        return "\n".join(["In percent, ± one standard error.\n", *tables])

    def save(self, folder: Path) -> None:
        """Writes `results.md` and, as the last file of an evaluation, `results.json`."""
        texts = {
            "results.md": self.to_markdown(),
            RESULTS: json.dumps(self.to_plain(), indent=2, ensure_ascii=False) + "\n",
        }
        for name, text in texts.items():
            write_atomic(folder / name, text)

    def _table(self, measure: str) -> str:
        counts = {}
        for one in self.outcomes:
            for accuracy in one.accuracies.values():
                counts[one.task] = accuracy.questions
        header = ["model", *self.tasks, "average"]
        rows = [["questions", *(str(counts[task]) for task in self.tasks), ""]]
        for model in self.models:
            cells = []
            measured = [self.accuracy(model, task, measure) for task in self.tasks]
            if not any(measured):  # a classifier where others are asked, or the other way round
                continue
            for accuracy in measured:
                both = None if accuracy is None else (accuracy.value, accuracy.standard_error)
                cells.append(_percent(both))
            rows.append([model, *cells, _percent(self.average(model, measure))])
        ruler = ["---", *["---:"] * (len(header) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows)]
        meaning = f": {MEANINGS[measure]}" if measure in MEANINGS else ""
        return "\n".join([f"**{measure}**{meaning}.\n", *lines, ""])


def _percent(value_and_error: tuple[float, float] | None) -> str:
    if value_and_error is None:
        return "-"
    value, error = value_and_error
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _outcome_to_plain(one: TaskOutcome) -> dict[str, Any]:
    measures = {}
    for measure, accuracy in one.accuracies.items():
        measures[measure] = accuracy.to_plain()
        if measure in one.subjects:
            measures[measure]["subjects"] = {
                name: part.to_plain() for name, part in one.subjects[measure].items()
            }
    return {"model": one.model, "task": one.task, "protocol": one.protocol, "measures": measures}
