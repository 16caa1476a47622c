"""MixLoRA beside LoRA of as many trainable parameters: several seeds of each, and what they say."""

import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax.scipy.special import betainc

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.config.run import RunConfig
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


# FIXME docstring of the merged demo.paired:
# """Whether two methods differ by more than seeds do: spread, and the paired t-test."""


SIGNIFICANT = 0.05
"""Chance below which a difference is no longer put down to seeds."""


class Spread(NamedTuple):
    """Mean and sample standard deviation (that of one value is 0) of one number over seeds."""

    mean: float
    deviation: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def chance(differences: Sequence[float]) -> float:
    """The p-value of the two-sided t-test that pairs do not differ, their differences given.

    It is the probability of a mean at least so far from 0 if seeds alone made the differences, and
    these were normal: 1 where all are 0, 0 where all are the same other number.

    Raises:
      ValueError: of less than two pairs no test can be made.
    """
    pairs = len(differences)
    if pairs < 2:
        raise ValueError(f"a paired test needs two pairs, got {pairs}")
    mean, deviation = spread(differences)
    if deviation == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    t, freedom = mean / (deviation / math.sqrt(pairs)), pairs - 1
    # The two tails of Student's t by the regularised incomplete beta function.
    return float(betainc(freedom / 2, 0.5, freedom / (freedom + t * t)))


def verdict(
    first: str, second: str, what: str, unit: str, digits: int, differences: Sequence[float]
) -> str:
    """A sentence about the differences `first` less `second` of pairs of an equal seed.

    Args:
      first: what the one is called.
      second: what the other is called.
      what: was measured.
      unit: of the differences.
      digits: after the point.
      differences: one for each seed.
    """
    mean, deviation = spread(differences)
    p, error = chance(differences), deviation / math.sqrt(len(differences))
    found = (
        "a difference beyond the spread over seeds, on this model and these questions"
        if p < SIGNIFICANT
        else "no difference beyond the spread over seeds"
    )
    tested = f"{len(differences)} pairs, t-test p = {p:.2g}"
    return (
        f"{what}: {first} less {second} is {mean:+.{digits}f} {unit}, "
        f"standard error {error:.{digits}f} ({tested}): {found}."
    )
