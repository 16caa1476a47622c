"""Runs the fuzz targets on many inputs and prints the figures: `make fuzz`.

Each session of pytest is a process of its own with its own seed, so that a crash of a library is
seen, and memory is that of a few thousand inputs.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SESSION_INPUTS = 5_000
SESSION_SECONDS = 3_600
MAX_MEMORY = 2_000
"""Largest memory of a session in MB; importing all that the targets need takes about 600."""

FOLDER = Path(__file__).parent


def session(seed: int, inputs: int, figures: Path) -> int:
    """Runs all targets in a process; returns its exit status, negative for a signal."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--hypothesis-seed={seed}"]
    environment = {**os.environ, "FUZZ_INPUTS": str(inputs), "FUZZ_FIGURES": str(figures)}
    try:
        return subprocess.run(
            [*command, str(FOLDER)], env=environment, timeout=SESSION_SECONDS, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return 124


def main() -> int:
    """Runs the sessions; the exit status is 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first session")
    parser.add_argument("--minutes", type=float, help="begin no session after this time")
    arguments = parser.parse_args()
    targets: dict[str, Any] = collections.defaultdict(lambda: [0, 0, 0.0])
    failed, memory, start = [], 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures, seed = Path(folder) / "figures.json", arguments.seed
        while sum(inputs for inputs, *_ in targets.values()) < arguments.inputs:
            if arguments.minutes and time.monotonic() - start > 60 * arguments.minutes:
                break
            figures.unlink(missing_ok=True)
            status = session(seed, min(SESSION_INPUTS, arguments.inputs), figures)
            result = json.loads(figures.read_text()) if figures.exists() else None
            if status or result is None or result["memory"] > MAX_MEMORY:
                failed.append(
                    f"seed {seed}: exit status {status}, {result and result['memory']} MB"
                )
            if result is None:
                break
            memory = max(memory, result["memory"])
            for name, each in result["targets"].items():
                inputs, refused, slowest = targets[name]
                targets[name] = [
                    inputs + each["inputs"],
                    refused + each["refused"],
                    max(slowest, each["slowest"]),
                ]
            seed += 1
    print(f"\n{'target':<36}{'inputs':>9}{'refused':>9}{'slowest':>11}")
    for name, (inputs, refused, slowest) in targets.items():
        print(f"{name:<36}{inputs:>9,}{refused:>9,}{slowest:>9.2f} s")
    total = sum(inputs for inputs, *_ in targets.values())
    minutes = (time.monotonic() - start) / 60
    print(
        f"{total:,} inputs in {seed - arguments.seed} sessions and {minutes:.0f} minutes, "
        f"at most {memory:,.0f} MB; {len(failed)} sessions failed"
    )
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
