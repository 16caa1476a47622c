"""Tables and files of an evaluation."""

import collections
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config.parse import to_plain
from moe_jax.errors import ConfigError
from moe_jax.evaluation.outcomes import Accuracy, MetricScore, TaskOutcome
from moe_jax.evaluation.scoring_protocols import PreparedTask
from moe_jax.files.atomic import write_atomic
from moe_jax.files.json_file import parse_json
from moe_jax.hf.base_model import BaseModel
from moe_jax.loaded.inference_model import BASE, NamedAdapter
from moe_jax.tasks.task import Task
from moe_jax.version import __version__

RESULTS_FILE = "results.json"

SAME_ANSWER_SHARE, FEWEST_QUESTIONS = 0.9, 20
"""Share of equal answers, among at least so many questions, from which the table has a note."""

MEASURE_DESCRIPTIONS = {
    "label_acc": "accuracy of the most likely label after a prompt that lists the options",
    "acc": "accuracy of the most likely option after the question",
    "acc_norm": "the same, with log-likelihoods divided by the number of characters",
    "accuracy": "accuracy of the class with the highest score of a score head",
    "f1": "F1 score of the second class",
    "matthews": "Matthews correlation coefficient",
    "pearson": "Pearson correlation",
    "spearman": "Spearman rank correlation",
}
"""Description of each measure in `results.md`."""


ValueAndError = tuple[float, float | None]
"""Value and its standard error; None if the sample does not tell it."""


def require_nothing_lost(folder: Path, tasks: Sequence[str], models: Sequence[str]) -> None:
    """Rejects a results folder with tasks or models that the new results would not contain.

    Args:
      folder: results folder; need not exist.
      tasks: names of the tasks to evaluate.
      models: names of the models to evaluate.

    Raises:
      ConfigError: earlier results would be lost.
    """
    file = folder / RESULTS_FILE
    if not file.exists():
        return
    try:
        results = parse_json(file.read_bytes())
        kinds = {"tasks": tasks, "models": models}
        earlier = {kind: [str(entry["name"]) for entry in results[kind]] for kind in kinds}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{file}: is not the result of an evaluation; give another output"
        ) from None
    for kind, names in kinds.items():
        lost = [name for name in earlier[kind] if name not in names]
        if lost:
            raise ConfigError(
                f"{file}: holds {kind} that this evaluation leaves out, and would be overwritten "
                f"without them: {', '.join(lost)}; include these too, or give another output"
            )


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
      settings: base, models, tasks and dtype, as plain JSON values; see `evaluation_settings`.
      outcomes: results of each model, task and protocol.
    """

    settings: Mapping[str, Any]
    outcomes: Sequence[TaskOutcome]

    @functools.cached_property
    def models(self) -> list[str]:
        """Names of the models, in the order of evaluation."""
        return list(dict.fromkeys(outcome.model for outcome in self.outcomes))

    @functools.cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of evaluation."""
        return list(dict.fromkeys(outcome.task for outcome in self.outcomes))

    def accuracy(self, model: str, task: str, measure: str) -> Accuracy | MetricScore | None:
        """One cell of the table; None if the task has no such measure."""
        for outcome in self.outcomes:
            if (outcome.model, outcome.task) == (model, task) and measure in outcome.accuracies:
                return outcome.accuracies[measure]
        return None

    def scores(self, model: str) -> dict[str, Accuracy | MetricScore]:
        """All results of a model, by `task/measure`."""
        return {
            f"{outcome.task}/{measure}": accuracy
            for outcome in self.outcomes
            if outcome.model == model
            for measure, accuracy in outcome.accuracies.items()
        }

    def average(self, model: str, measure: str) -> ValueAndError | None:
        """Unweighted mean over tasks and its standard error; None if a task lacks the measure.

        The error is None if that of a task is.
        """
        cells = [self.accuracy(model, task, measure) for task in self.tasks]
        known = [cell for cell in cells if cell is not None]
        if len(known) < len(cells):
            return None
        mean = sum(cell.value for cell in known) / len(known)
        errors = [cell.standard_error for cell in known if cell.standard_error is not None]
        if len(errors) < len(known):
            return mean, None
        return mean, math.hypot(*errors) / len(known)

    def difference(self, model: str, task: str, measure: str) -> ValueAndError | None:
        """Mean difference to the first model over the questions, and its standard error.

        Both models answer the same questions, so that the error is that of the differences, which
        is smaller than that of two separate samples. The error is None if the differences of all
        questions are equal. None if the task has no such measure, and for classifiers.
        """
        right = [
            [example["picked"][measure] == example["answer"] for example in outcome.examples]
            for name in (self.models[0], model)
            for outcome in self.outcomes
            if (outcome.model, outcome.task) == (name, task)
            and isinstance(outcome.accuracies.get(measure), Accuracy)
            and all(isinstance(example["picked"], Mapping) for example in outcome.examples)
        ]
        if len(right) != 2:
            return None
        differences = [int(ours) - int(first) for first, ours in zip(*right, strict=True)]
        count = len(differences)
        mean = sum(differences) / count
        variance = sum((d - mean) ** 2 for d in differences) / max(count - 1, 1)
        return mean, math.sqrt(variance / count) or None

    def measures(self) -> list[str]:
        """All measures, in the order of `MEASURE_DESCRIPTIONS`."""
        names = {measure for outcome in self.outcomes for measure in outcome.accuracies}
        described = [name for name in MEASURE_DESCRIPTIONS if name in names]
        return [*described, *sorted(names - set(MEASURE_DESCRIPTIONS))]

    def to_plain(self) -> dict[str, Any]:
        """Content of `results.json`: everything except the examples."""
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
        differences = [
            {
                "model": model,
                "to": self.models[0],
                "task": task,
                "measure": measure,
                "difference": difference[0],
                "standard_error": difference[1],
            }
            for measure in self.measures()
            for model in self.models[1:]
            for task in self.tasks
            if (difference := self.difference(model, task, measure)) is not None
        ]
        return {
            "moe_jax": __version__,
            **self.settings,
            "results": [outcome.to_plain() for outcome in self.outcomes],
            "averages": averages,
            "differences": differences,
        }

    def to_markdown(self) -> str:
        """Content of `results.md`: tables with models as rows and tasks as columns, by measure."""
        tables = [self._table(measure) for measure in self.measures()]
        notes = [f"Note: {note}.\n" for note in self.one_answer_notes()]
        paired = (
            ""
            if len(self.models) == 1
            else " Differences are between answers to the same questions."
        )
        return "\n".join([f"In percent, ± one standard error.{paired}\n", *tables, *notes])

    def one_answer_notes(self) -> list[str]:
        """Notes on models that give nearly all questions of a task the same answer.

        Their accuracy is that of the answer, whatever the questions are.
        """
        notes = []
        for outcome in self.outcomes:
            examples = [e for e in outcome.examples if isinstance(e.get("picked"), Mapping)]
            if len(examples) < FEWEST_QUESTIONS:
                continue
            for measure in outcome.accuracies:
                picked = collections.Counter(example["picked"][measure] for example in examples)
                option, count = picked.most_common(1)[0]
                right = sum(example["answer"] == option for example in examples)
                if count >= SAME_ANSWER_SHARE * len(examples) > right:
                    notes.append(
                        f"{outcome.model} picks option {option + 1} in {count} of "
                        f"{len(examples)} questions of {outcome.task} ({measure}), where it is the "
                        f"right one in {right}"
                    )
        return notes

    def save(self, folder: Path) -> None:
        """Writes `results.md` and, as the last file of an evaluation, `results.json`."""
        texts = {
            "results.md": self.to_markdown(),
            RESULTS_FILE: json.dumps(self.to_plain(), indent=2, ensure_ascii=False) + "\n",
        }
        for name, text in texts.items():
            write_atomic(folder / name, text)

    def _table(self, measure: str) -> str:
        counts = {
            outcome.task: accuracy.questions
            for outcome in self.outcomes
            for accuracy in outcome.accuracies.values()
        }
        header = ["model", *self.tasks, "average"]
        rows = [["questions", *(str(counts[task]) for task in self.tasks), ""]]
        for model in self.models:
            results = [self.accuracy(model, task, measure) for task in self.tasks]
            if not any(results):  # a classifier in the table of a language model, or vice versa
                continue
            cells = [None if r is None else (r.value, r.standard_error) for r in results]
            cells.append(self.average(model, measure))
            rows.append([model, *map(_percent, cells)])
        for model in self.models[1:]:
            cells = [self.difference(model, task, measure) for task in self.tasks]
            if any(cells):
                title = f"{model} - {self.models[0]}"
                rows.append([title, *(_percent(cell, sign="+") for cell in cells), ""])
        ruler = ["---", *["---:"] * (len(header) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows)]
        description = MEASURE_DESCRIPTIONS.get(measure)
        title = f"**{measure}**" if description is None else f"**{measure}**: {description}"
        return "\n".join([f"{title}.\n", *lines, ""])


def _percent(value_and_error: ValueAndError | None, sign: str = "-") -> str:
    if value_and_error is None:
        return "-"
    value, error = value_and_error
    return f"{100 * value:{sign}.1f} ± {'-' if error is None else f'{100 * error:.1f}'}"


def evaluation_settings(
    base: BaseModel,
    models: Sequence[NamedAdapter | None],
    tasks: Sequence[Task],
    questions: Mapping[str, Sequence[Any]],
    prepared: Sequence[PreparedTask],
    dtype: str,
) -> dict[str, Any]:
    """Base, models and tasks of an evaluation, as plain JSON values.

    Args:
      base: base model.
      models: adapters; None is the base alone.
      tasks: tasks.
      questions: questions or rows of each task, by name.
      prepared: prepared questions, for the number of truncated ones.
      dtype: dtype of weights and computation.
    """
    return {
        "base": base.identity._asdict(),
        "dtype": dtype,
        "models": [
            {"name": BASE, "adapter": None}
            if model is None
            else {
                "name": model.name,
                "adapter": model.origin,
                "digest": model.digest,
                "method": to_plain(model.saved.method),
                "step": model.saved.step,
            }
            for model in models
        ],
        "tasks": [
            {
                **to_plain(task),
                "name": task.name,
                "questions": len(questions[task.name]),
                "cut": {p.protocol: p.num_truncated for p in prepared if p.name == task.name},
            }
            for task in tasks
        ],
    }
