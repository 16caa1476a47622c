"""Compares MixLoRA with LoRA of as many trainable parameters on the demo's tiny Llama.

    python -m moe_jax.demo.compare --output demo_output

Both methods are trained with three seeds. The differences between pairs of the same seed are tested
with a paired t-test.
"""

import argparse
import json
import math
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax.scipy.special import betainc

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.commands.process import set_up_process
from moe_jax.config.run import RunConfig
from moe_jax.demo import tiny_mixlora
from moe_jax.demo.corpus import demo_config, write_demo_data
from moe_jax.demo.score import AnswerScore, HeldOutScorer
from moe_jax.errors import UserError, report
from moe_jax.files.atomic import write_atomic
from moe_jax.training.records.plan import parameter_count
from moe_jax.training.run.loop import train

CONFIG = "configs/tiny_comparison.py"

ALL = "all"
"""Row of the unweighted mean over tasks."""

SIGNIFICANCE_LEVEL = 0.05
"""p-value below which a difference is reported as larger than the variation over seeds."""

_LABELS = {"mixlora": "MixLoRA", "lora": "LoRA"}


def main(arguments: list[str]) -> int:
    """Parses flags, runs the comparison and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.demo.compare",
        description="Compares MixLoRA with LoRA on a tiny Llama, with three seeds each.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all files")
    parser.add_argument("--steps", type=int, help=f"training steps (default: those of {CONFIG})")
    args = parser.parse_args(arguments)
    try:
        data = write_demo_data(args.output)
        config = demo_config(CONFIG, data, args.steps)
        print(f"Training with {CONFIG}\n")
        result = train(config, args.output / "comparison")
        if result.interrupted_by is not None:
            return 128 + result.interrupted_by
        scorer = HeldOutScorer(demo_config(tiny_mixlora.__file__, data), "default")
        comparison = compare_methods(config, result.adapters, scorer)
        file = args.output / "comparison.json"
        comparison.write(file)
    except UserError as error:
        return report(error)
    print("\n".join(["", *comparison.lines(), "", f"figures   {file}"]))
    return 0


class MethodScores(NamedTuple):
    """Scores of the adapters of one method.

    Attributes:
      method: name of the method.
      parameters: number of trainable parameters of each adapter.
      learning_rate: peak learning rate of each adapter.
      scores: scores by seed and task.
    """

    method: str
    parameters: int
    learning_rate: float
    scores: dict[int, dict[str, AnswerScore]]

    @property
    def label(self) -> str:
        """Name of the method in text."""
        return _LABELS.get(self.method, self.method)

    def values(self, measure: str) -> dict[str, list[float]]:
        """`exact` or `loss` of each seed, by task; `ALL` is the mean over tasks."""
        by_seed = [self.scores[seed] for seed in sorted(self.scores)]
        rows = {task: [getattr(s[task], measure) for s in by_seed] for task in by_seed[0]}
        means = [statistics.fmean(column) for column in zip(*rows.values(), strict=True)]
        return {**rows, ALL: means}


@dataclass(frozen=True)
class Comparison:
    """Scores of two methods with the same questions and seeds.

    Attributes:
      first, second: scores of the methods.
      steps: number of training steps.
      rows: batch size.
    """

    first: MethodScores
    second: MethodScores
    steps: int
    rows: int

    def differences(self, measure: str) -> dict[str, list[float]]:
        """`first` minus `second` of each seed, by task and for `ALL`."""
        first, second = self.first.values(measure), self.second.values(measure)
        return {
            task: [a - b for a, b in zip(first[task], second[task], strict=True)] for task in first
        }

    def verdicts(self) -> list[str]:
        """A sentence for each measure on the difference between the methods."""
        names = self.first.label, self.second.label
        points = [100 * value for value in self.differences("exact")[ALL]]
        loss = self.differences("loss")[ALL]
        return [
            verdict(*names, "Answered exactly right", "percentage points", 1, points),
            verdict(*names, "Loss", "nats per token", 3, loss),
        ]

    def lines(self) -> list[str]:
        """Lines of text: settings, tables and verdicts."""
        first, second = self.first, self.second
        seeds = ", ".join(map(str, sorted(first.scores)))
        sizes = f"{first.parameters:,} and {second.parameters:,} trainable parameters"
        rates = f"{first.learning_rate:g} and {second.learning_rate:g}"
        return [
            f"{first.label} and {second.label} with {sizes}, including the router,",
            f"at learning rates of {rates}: {self.steps} steps of {self.rows} rows, seeds {seeds}.",
            "Mean ± standard deviation over seeds. Differences are between runs of the same seed,",
            "which read the same rows in the same order.",
            "",
            *self._table("answered exactly right, %", "exact", 100.0, 1),
            "",
            *self._table("loss per answer token", "loss", 1.0, 3),
            "",
            *(line for sentence in self.verdicts() for line in textwrap.wrap(sentence, 98)),
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
        """Writes all scores and statistics as JSON."""
        measures = ("exact", "loss")
        plain = {
            "steps": self.steps,
            "rows": self.rows,
            "methods": [_to_plain(scores, measures) for scores in (self.first, self.second)],
            "differences": {
                measure: {
                    task: {**spread(values)._asdict(), "p": p_value(values)}
                    for task, values in self.differences(measure).items()
                }
                for measure in measures
            },
            "verdicts": self.verdicts(),
        }
        write_atomic(file, json.dumps(plain, indent=2) + "\n")


def _to_plain(method: MethodScores, measures: Sequence[str]) -> dict[str, Any]:
    return {
        "method": method.method,
        "parameters": method.parameters,
        "learning_rate": method.learning_rate,
        "seeds": {
            str(seed): {
                task: {"questions": score.questions, "exact": score.exact, "loss": score.loss}
                for task, score in scores.items()
            }
            for seed, scores in method.scores.items()
        },
        **{
            measure: {
                task: spread(values)._asdict() for task, values in method.values(measure).items()
            }
            for measure in measures
        },
    }


def compare_methods(
    config: RunConfig, folders: Mapping[str, Path], scorer: HeldOutScorer
) -> Comparison:
    """Scores the adapters of a finished run: MixLoRA and LoRA with the same seeds.

    Args:
      config: configuration of the run.
      folders: folders of the adapters, by name.
      scorer: scorer of the held-out questions.
    """
    by_method: dict[str, MethodScores] = {}
    for name, adapter in config.adapters.items():
        saved, method = load_adapter(folders[name]), METHODS.name_of(adapter.method)
        rate, count = adapter.optimizer.learning_rate, parameter_count(saved.tree)
        scores = by_method.setdefault(method, MethodScores(method, count, rate, {}))
        scores.scores[config.seed(name)] = scorer(saved)
    first, second = by_method["mixlora"], by_method["lora"]
    if first.scores.keys() != second.scores.keys():
        raise ValueError("the two methods were trained with different seeds")
    batch_size = next(iter(config.adapters.values())).batch_size
    steps = load_adapter(next(iter(folders.values()))).step
    return Comparison(first, second, steps, batch_size)


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; the deviation of a single value is 0."""

    mean: float
    deviation: float


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def p_value(differences: Sequence[float]) -> float:
    """p-value of the two-sided paired t-test, given the differences of the pairs.

    1 if all differences are 0, and 0 if all have the same other value.

    Raises:
      ValueError: there are fewer than two pairs.
    """
    pairs = len(differences)
    if pairs < 2:
        raise ValueError(f"a paired test needs two pairs, got {pairs}")
    mean, deviation = spread(differences)
    if deviation == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    t, freedom = mean / (deviation / math.sqrt(pairs)), pairs - 1
    # Both tails of Student's t by the regularized incomplete beta function.
    return float(betainc(freedom / 2, 0.5, freedom / (freedom + t * t)))


def verdict(
    first: str, second: str, measure: str, unit: str, digits: int, differences: Sequence[float]
) -> str:
    """A sentence on the differences `first` minus `second` of pairs with the same seed.

    Args:
      first, second: names of the methods.
      measure: name of the measure.
      unit: unit of the differences.
      digits: number of decimals.
      differences: difference of each pair.
    """
    mean, deviation = spread(differences)
    p, error = p_value(differences), deviation / math.sqrt(len(differences))
    conclusion = (
        "larger than the variation over seeds, on this model and these questions"
        if p < SIGNIFICANCE_LEVEL
        else "not larger than the variation over seeds"
    )
    test = f"{len(differences)} pairs, t-test p = {p:.2g}"
    return (
        f"{measure}: {first} minus {second} is {mean:+.{digits}f} {unit}, "
        f"standard error {error:.{digits}f} ({test}): {conclusion}."
    )


if __name__ == "__main__":
    set_up_process()
    sys.exit(main(sys.argv[1:]))
