"""MixLoRA beside LoRA of as many trainable parameters: several seeds of each, and what they say."""

import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.config.run import RunConfig
from moe_jax.demo.paired import chance, spread, verdict
from moe_jax.demo.score import Examiner, Score
from moe_jax.files.atomic import write_atomic
from moe_jax.training.records.plan import parameter_count

ALL = "all"
"""The row of the mean over tasks, each counting the same."""

_LABELS = {"mixlora": "MixLoRA", "lora": "LoRA"}


class Answers(NamedTuple):
    """What the adapters of one method answered.

    Attributes:
      method: its name.
      parameters: the trainable parameters of each adapter.
      learning_rate: of each adapter.
      scores: by seed and task.
    """

    method: str
    parameters: int
    learning_rate: float
    scores: dict[int, dict[str, Score]]

    @property
    def label(self) -> str:
        """The method's name as people write it."""
        return _LABELS.get(self.method, self.method)

    def values(self, measure: str) -> dict[str, list[float]]:
        """`exact` or `loss` of each task, and their mean as `ALL`, a number for each seed."""
        by_seed = [self.scores[seed] for seed in sorted(self.scores)]
        rows = {task: [getattr(s[task], measure) for s in by_seed] for task in by_seed[0]}
        means = [statistics.fmean(column) for column in zip(*rows.values(), strict=True)]
        return {**rows, ALL: means}


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same questions, with the same seeds.

    Attributes:
      first, second: the methods' answers.
      steps: that each adapter trained.
      rows: of each step.
    """

    first: Answers
    second: Answers
    steps: int
    rows: int

    def differences(self, measure: str) -> dict[str, list[float]]:
        """`first` less `second` of each task and of `ALL`, a number for each seed."""
        first, second = self.first.values(measure), self.second.values(measure)
        return {
            task: [a - b for a, b in zip(first[task], second[task], strict=True)] for task in first
        }

    def verdicts(self) -> list[str]:
        """What the figures say, a sentence for each measure."""
        names = self.first.label, self.second.label
        points = [100 * value for value in self.differences("exact")[ALL]]
        loss = self.differences("loss")[ALL]
        return [
            verdict(*names, "Answered exactly right", "percentage points", 1, points),
            verdict(*names, "Loss", "nats per token", 3, loss),
        ]

    def lines(self) -> list[str]:
        """A table for people, and the verdicts."""
        first, second = self.first, self.second
        seeds = ", ".join(map(str, sorted(first.scores)))
        sizes = f"{first.parameters:,} and {second.parameters:,} trainable parameters"
        rates = f"{first.learning_rate:g} and {second.learning_rate:g}"
        return [
            f"{first.label} and {second.label} with {sizes}, the router's counted,",
            f"at learning rates of {rates}: {self.steps} steps of {self.rows} rows, seeds {seeds}.",
            "Mean ± standard deviation over seeds; differences are of pairs with the same seed,",
            "which read the same rows in the same order.",
            "",
            *self._table("answered exactly right, %", "exact", 100.0, 1),
            "",
            *self._table("loss per answer token", "loss", 1.0, 3),
            "",
            *(line for said in self.verdicts() for line in textwrap.wrap(said, 98)),
        ]

    def _table(self, title: str, measure: str, unit: float, digits: int) -> list[str]:
        first, second = self.first, self.second
        lines = [f"{title:27}{first.label:>16}{second.label:>16}{'difference':>16}"]
        columns = [first.values(measure), second.values(measure), self.differences(measure)]
        for task in columns[0]:
            cells = ""
            for column, sign in zip(columns, ("", "", "+"), strict=True):
                mean, deviation = spread([unit * value for value in column[task]])
                cells += f"{f'{mean:{sign}.{digits}f} ± {deviation:.{digits}f}':>16}"
            lines.append(f"{task:27}{cells}")
        return lines

    def write(self, file: Path) -> None:
        """Writes every score and every figure of the table as JSON."""
        measures = ("exact", "loss")
        plain = {
            "steps": self.steps,
            "rows": self.rows,
            "methods": [_plain(answers, measures) for answers in (self.first, self.second)],
            "differences": {
                measure: {
                    task: {**spread(values)._asdict(), "p": chance(values)}
                    for task, values in self.differences(measure).items()
                }
                for measure in measures
            },
            "verdicts": self.verdicts(),
        }
        write_atomic(file, json.dumps(plain, indent=2) + "\n")


def _plain(answers: Answers, measures: Sequence[str]) -> dict[str, Any]:
    return {
        "method": answers.method,
        "parameters": answers.parameters,
        "learning_rate": answers.learning_rate,
        "seeds": {
            str(seed): {
                task: {"questions": score.questions, "exact": score.exact, "loss": score.loss}
                for task, score in scores.items()
            }
            for seed, scores in answers.scores.items()
        },
        **{
            measure: {
                task: spread(values)._asdict() for task, values in answers.values(measure).items()
            }
            for measure in measures
        },
    }


def examine(config: RunConfig, folders: Mapping[str, Path], ask: Examiner) -> Comparison:
    """Asks all adapters of a finished run: MixLoRA and LoRA, with the same seeds.

    Args:
      config: of the run.
      folders: of its adapters.
      ask: has the questions.
    """
    found: dict[str, Answers] = {}
    for name, adapter in config.adapters.items():
        saved, method = load_adapter(folders[name]), METHODS.name_of(adapter.method)
        rate, count = adapter.optimizer.learning_rate, parameter_count(saved.tree)
        answers = found.setdefault(method, Answers(method, count, rate, {}))
        answers.scores[config.seed(name)] = ask(saved)
    first, second = found["mixlora"], found["lora"]
    if first.scores.keys() != second.scores.keys():
        raise ValueError("the two methods were trained with different seeds")
    some = next(iter(config.adapters.values()))
    steps = load_adapter(next(iter(folders.values()))).step
    return Comparison(first, second, steps, some.batch_size)
