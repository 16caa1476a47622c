"""Accuracy of methods that were trained with several seeds, and their paired differences.

    python benchmarks/compare_seeds.py runs/smollm2_tasks/evaluation mixlora lora

Models are named METHOD-SEED, as in `configs/smollm2_tasks.py`. A question's score is the share of a
method's seeds that answer it correctly. Printed are, in percent, the mean score over questions with
its standard error, the standard deviation of the accuracy over seeds, and the mean difference
between two methods with the standard error of the paired differences. The base, if it was
evaluated, has one score a question.

Needs numpy.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.report import refuse, table
from moe_jax.errors import ConfigError, UserError

BASE = "base"


def right_answers(folder: Path, method: str, task: str, measure: str) -> np.ndarray:
    """Bool [seeds, questions]: the questions that each seed of a method answers correctly.

    Raises:
      ConfigError: no model has this name, or its answers are of other questions than another's.
    """
    pattern = method if method == BASE else f"{method}-*"
    files = sorted((folder / "predictions").glob(f"{pattern}/{task}.choices.jsonl"))
    if not files:
        raise ConfigError(f"{folder}: no answers of {pattern!r} to {task}")
    rows = []
    for file in files:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        answers = sorted(
            (record for record in records if "picked" in record), key=lambda r: r["question"]
        )
        rows.append([record["picked"][measure] == record["answer"] for record in answers])
    if len({len(row) for row in rows}) != 1:
        raise ConfigError(f"{folder}: the seeds of {method!r} answered unequal numbers of {task}")
    return np.array(rows)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of the values, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def lines_of(folder: Path, methods: Sequence[str], task: str, measure: str) -> list[list[str]]:
    """Rows of the table of one task."""
    right = {method: right_answers(folder, method, task, measure) for method in methods}
    rows = []
    for method, seeds in right.items():
        mean, error = mean_and_error(seeds.mean(axis=0))
        deviation = "-" if len(seeds) == 1 else f"{100 * seeds.mean(axis=1).std(ddof=1):.1f}"
        accuracy = f"{100 * mean:.1f} ± {100 * error:.1f}"
        rows.append([task, method, str(seeds.shape[1]), str(len(seeds)), accuracy, deviation])
    pairs = [(first, other) for n, first in enumerate(methods) for other in methods[n + 1 :]]
    for first, other in pairs:
        mean, error = mean_and_error(right[first].mean(axis=0) - right[other].mean(axis=0))
        difference = f"{100 * mean:+.1f} ± {100 * error:.1f}"
        rows.append([task, f"{first} - {other}", "", "", difference, ""])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder `evaluation` of a run")
    parser.add_argument("methods", nargs="+", help="methods, the names of models before -SEED")
    parser.add_argument("--measure", default="acc", help="acc or acc_norm (%(default)s)")
    args = parser.parse_args(argv)
    try:
        has_base = (args.folder / "predictions" / BASE).is_dir()
        methods = [*args.methods, *([BASE] if has_base else [])]
        files = sorted((args.folder / "predictions").glob(f"{args.methods[0]}-*/*.choices.jsonl"))
        tasks = dict.fromkeys(file.name.removesuffix(".choices.jsonl") for file in files)
        if not tasks:
            raise ConfigError(f"{args.folder}: holds no answers of {args.methods[0]!r}")
        rows = [row for task in tasks for row in lines_of(args.folder, methods, task, args.measure)]
        print(
            table(["task", "model", "questions", "seeds", args.measure, "deviation of seeds"], rows)
        )
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
