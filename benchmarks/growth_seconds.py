"""Table and summary of the recorded results of `grouped.py --time`, for `growth.md`.

Needs jax only.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.dispatch_forms import BATCHED, GROUPED, ONE_HOT

LORA = "lora"
HEADER = (
    "| size | experts | rank | E R | one-hot, seconds | grouped / one-hot | batched / one-hot "
    "| LoRA / one-hot |"
)


class Recorded(NamedTuple):
    """Recorded times of layers in one run of `grouped.py`.

    Attributes:
      size: name of the model size.
      run: description of the run: number of tokens, machine and date.
      rows: figures by number of experts, rank and form.
    """

    size: str
    run: str
    rows: dict[tuple[int, int, str], Any]


def recorded(folder: Path) -> list[Recorded]:
    """Reads the runs in the files `grouped_*.json` of a folder."""
    runs = []
    for path in sorted(folder.glob("grouped_*.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        settings, machine = figures["settings"], figures["machine"]
        rows = {
            (row["experts"], row["rank"], row["form"]): row
            for row in figures["rows"]
            if row["part"] == "layer" and row["seconds"]
        }
        load_average = machine["load_average"]
        load = "unknown" if load_average is None else f"{load_average:.1f}"
        run = (
            f"{settings['size']}: {settings['rows']} x {settings['length']} tokens, "
            f"{settings['rounds']} rounds, {machine['processor']}, {machine['cores']} cores, "
            f"load {load} before, jax {machine['versions']['jax']}, "
            f"{machine['date'][:10]}"
        )
        forms = {form for *_, form in rows}
        if forms >= {ONE_HOT, GROUPED}:
            runs.append(Recorded(settings["size"], run, rows))
    return runs


def lines(runs: Sequence[Recorded]) -> list[str]:
    """Formats the rows of the table."""
    table_lines = []
    for run in runs:
        for experts, rank, form in run.rows:
            if form != ONE_HOT:
                continue
            seconds = run.rows[experts, rank, ONE_HOT]["seconds"]["median"]
            cells = [run.size, f"{experts}", f"{rank}", f"{experts * rank}", f"{seconds:.3g}"]
            grouped = _ratio(run, experts, rank, GROUPED)
            low_to_high = "{median:.2f} ({lowest:.2f} to {highest:.2f})"
            cells.append(low_to_high.format(**grouped) if grouped else "")
            for other in (BATCHED, LORA):
                ratio = _ratio(run, experts, rank, other)
                cells.append(f"{ratio['median']:.2f}" if ratio else "")
            table_lines.append(f"| {' | '.join(cells)} |")
    return table_lines


def summary(run: Recorded) -> str:
    """Sentence on the settings in which the grouped form is faster, and on its best ratio."""
    ratios = {
        (experts, rank): ratio
        for experts, rank, form in run.rows
        if form == ONE_HOT and (ratio := _ratio(run, experts, rank, GROUPED))
    }
    slower = [e * r for (e, r), ratio in ratios.items() if ratio["highest"] >= 1.0]
    always = [e * r for e, r in ratios if e * r > max(slower, default=0)]
    experts, rank = min(ratios, key=lambda setting: ratios[setting]["median"])
    least = ratios[experts, rank]["median"]
    faster = len(ratios) - len(slower)
    beyond = f"in all from E R of {min(always)} on" if always else "but not at the largest E R"
    return (
        f"At size `{run.size}` the grouped form is, in every round, faster in {faster} of "
        f"{len(ratios)} settings, {beyond}; in {least:.2f} of the time with {experts} experts of "
        f"rank {rank}."
    )


def _ratio(run: Recorded, experts: int, rank: int, form: str) -> dict[str, float] | None:
    row = run.rows.get((experts, rank, form))
    return None if row is None else row["ratio_to_one_hot"]
