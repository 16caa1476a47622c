"""Overhead of the training loop over its steps, with logging and saves.

    python benchmarks/loop.py --output loop.json
    python benchmarks/loop.py --size d512 --steps 20

`moe_jax.training.run.loop.train` trains on a random base with generated rows: without saves, with a
line of metrics after each step, with frequent saves, and with several adapters. These runs
alternate with consecutive calls of the same compiled step on one batch that is already on the
device. The ratio of their times is 1 if the device never waits.

The processor time of the loop's thread is also reported. It is hidden as long as it is shorter than
a step on the device. On a CPU, host and device share the cores, so that it adds to the time, and so
do saves.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.generated_run import BASE, ROWS, run_config, write_base, write_rows
from benchmarks.report import (
    check_output,
    check_positive,
    machine,
    one_line,
    refuse,
    say,
    table,
    write_json,
)
from benchmarks.sizes import SIZE_HELP, model_of
from benchmarks.timing import spread
from moe_jax.config.run import RunConfig
from moe_jax.errors import ConfigError, UserError
from moe_jax.hf.load import load_base_params
from moe_jax.training.run.inputs import read_inputs
from moe_jax.training.run.loop import train
from moe_jax.training.step.micro_batches import join_rows
from moe_jax.training.step.program import build_program

WARM_UP = 10
"""Number of steps before timing starts; the first one compiles."""
AHEAD = 4
"""Number of steps that the host may be ahead of the device, as in the loop."""
NEVER = 10**6


class Setting(NamedTuple):
    """Settings of a run.

    Attributes:
      title: description for the table.
      adapters: number of adapters.
      log_every: number of steps between two lines of metrics.
      save_every: number of steps between two saved states.
    """

    title: str
    adapters: int
    log_every: int
    save_every: int


class Timing(NamedTuple):
    """Seconds of a step.

    Attributes:
      wall: elapsed time.
      host: processor time of the loop's thread.
    """

    wall: float
    host: float


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Returns the settings of all measured runs."""
    return [
        Setting("steps only", 1, args.log_every, NEVER),
        Setting("a line each step", 1, 1, NEVER),
        Setting(f"a state every {args.save_every} steps", 1, args.log_every, args.save_every),
        Setting(f"{args.adapters} adapters", args.adapters, args.log_every, NEVER),
    ]


class StepOnly:
    """Compiled training step on one batch on the device, without the loop."""

    def __init__(self, config: RunConfig):
        inputs = read_inputs(config, lambda _: None)
        self._program = build_program(config, inputs.base.config, inputs.steps)
        shardings = self._program.param_shardings
        self._params = load_base_params(
            inputs.base.folder, inputs.base.config, "float32", shardings
        )
        rows = join_rows([next(data.iterator) for data in inputs.train.values()])
        self._batch = self._program.put_train_batch(rows)
        self._state = self._program.init_state(self._params)
        self.seconds(WARM_UP)

    def seconds(self, steps: int) -> float:
        """Runs steps and returns the mean seconds of a step."""
        pending: list[Any] = []
        start = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._program.train_step(self._state, self._params, self._batch)
            pending.append(metrics["tokens"])
            if len(pending) > AHEAD:
                pending.pop(0).block_until_ready()
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / steps


def run(config: RunConfig) -> Timing:
    """Trains and returns the times of a step after the warm-up."""
    stamps: dict[int, tuple[float, float]] = {}

    def listen(line: str) -> None:
        # The loop reports a step as soon as its metrics are available.
        if line.startswith("step "):
            step = int(line.removeprefix("step ").partition("/")[0])
            stamps[step] = time.perf_counter(), time.thread_time()

    with tempfile.TemporaryDirectory() as workdir:
        result = train(config, Path(workdir), listen)
    if result.interrupted_by is not None:
        raise SystemExit(128 + result.interrupted_by)
    first, last = min(step for step in stamps if step >= WARM_UP), max(stamps)
    pairs = zip(stamps[first], stamps[last], strict=True)
    return Timing(*((end - start) / (last - first) for start, end in pairs))


def measure(setting: Setting, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Times the loop and the compiled step alternately with one setting."""
    config = run_config(
        folder,
        setting.adapters,
        args.rows,
        {"max_length": args.length},
        training={"steps": WARM_UP + args.steps, "log_every": setting.log_every},
        checkpoints={"every": setting.save_every, "keep": 2},
    )
    step_only = StepOnly(config)
    pairs = [(step_only.seconds(args.steps), run(config)) for _ in range(args.repeats)]
    return {
        **setting._asdict(),
        "loop_to_step": spread([loop.wall / step for step, loop in pairs])._asdict(),
        "step_seconds": spread([step for step, _ in pairs])._asdict(),
        "loop_seconds": spread([loop.wall for _, loop in pairs])._asdict(),
        "host_seconds": spread([loop.host for _, loop in pairs])._asdict(),
    }


def table_cells(figure: dict[str, Any]) -> list[str]:
    ratio = figure["loop_to_step"]
    names = ("step_seconds", "loop_seconds", "host_seconds")
    return [
        figure["title"],
        f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})",
        *(f"{1e3 * figure[name]['median']:.2f} ms" for name in names),
    ]


def require_whole_numbers(args: argparse.Namespace) -> None:
    check_positive(args, ("rows", "length", "adapters", "log_every", "save_every", "repeats"))
    if args.steps < 2 * args.log_every:
        raise ConfigError(f"--steps: must be at least {2 * args.log_every}, twice --log-every")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", default="tiny", help=SIZE_HELP)
    parser.add_argument(
        "--rows", type=int, default=8, help="number of rows of each adapter in a step (8)"
    )
    parser.add_argument(
        "--length", type=int, default=64, help="maximum number of tokens of a row (64)"
    )
    parser.add_argument(
        "--adapters", type=int, default=4, help="number of adapters of the last run (4)"
    )
    parser.add_argument(
        "--log-every",
        type=int,
        default=10,
        help="number of steps between two lines of metrics (10)",
    )
    parser.add_argument(
        "--save-every", type=int, default=10, help="number of steps between two saved states (10)"
    )
    parser.add_argument("--steps", type=int, default=100, help="number of timed steps (100)")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed pairs (5)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        check_output(args.output)
        require_whole_numbers(args)
        model_of(args.size)
        facts = machine()
        print(
            f"{args.size} base, {args.rows} x {args.length} tokens per adapter; {one_line(facts)}"
        )
        figures = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_base(folder / BASE, args.size)
            write_rows(folder / ROWS, 2000)
            for setting in settings_of(args):
                say(f"measuring: {setting.title}")
                figures.append(measure(setting, folder, args))
        headings = ("setting", "loop / step", "step", "loop", "host")
        print(table(headings, [table_cells(figure) for figure in figures]))
        write_json(args.output, args, benchmark="loop", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
