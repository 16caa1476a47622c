"""The measurements of `benchmarks/gpu.py`: written line by line, read, and shown as a table."""

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = "gpu.jsonl"


class Recorder:
    """Writes the measurements of a part, and knows how much time it has left."""

    def __init__(self, args: Namespace):
        self.args = args
        self._file = args.output / RESULTS
        self._end = time.monotonic() + args.seconds

    def left(self) -> float:
        """Seconds until the end of the part."""
        return self._end - time.monotonic()

    def write(self, **fields: Any) -> None:
        """Appends a line to the results."""
        with self._file.open("a") as file:
            file.write(json.dumps({"part": self.args.part, **fields}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempt(self, what: Any, function: Callable[[], Any]) -> Any:
        """The result of `function`; a failure is recorded, and None returned."""
        try:
            return function()
        except Exception as error:  # noqa: BLE001 - other measurements may still succeed
            self.write(case=what, error=f"{type(error).__name__}: {error}"[:600])
            return None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The measurements of a results file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def as_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Formats the steps as a Markdown table, with what else was measured below it."""
    rows = [
        "| part | step | s | tokens/s | needed TFLOP/s | share | planned GiB | peak GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    others = []
    for line in lines:
        if "seconds" in line:
            method, differs = line["case"]
            named = ", ".join(f"{name} {value}" for name, value in differs.items())
            cells = [
                line["part"],
                f"{method} {named}".strip(),
                f"{line['seconds']:.4g}",
                f"{line['tokens_per_second']:,.0f}",
                f"{line['needed_tflops']:.4g}",
                f"{line['needed_share']:.1%}" if "needed_share" in line else "",
                f"{line['planned_gib']:.1f}" if "planned_gib" in line else "",
                f"{line['peak_gib']:.1f}" if line.get("peak_gib") else "",
            ]
            rows.append(f"| {' | '.join(cells)} |")
        else:
            others.append(f"{line['part']}: " + json.dumps({**line, "part": None}, default=str))
    return "\n".join([*rows, "", *others])
