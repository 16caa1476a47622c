"""Overhead of the training loop over its steps: gaps, logging, saves.

    python benchmarks/loop.py --output loop.json
    python benchmarks/loop.py --size d512 --steps 20

A random base is trained by `moe_jax.training.run.loop.train` on generated rows: as it is, with a
line of metrics after each step, with a state saved every few steps, and with several adapters at
once. In turn with each of these runs, the same compiled step is called back to back on one batch
that is on the device already; that is all that the device has to do. Their ratio is 1 where the
device never waits. Only ratios of neighbours in time are quoted.

The host's own work is also given: processor time of the thread that runs the loop. As long as it is
shorter than a step on the device, it costs nothing there. On a CPU host and device share the cores,
so that it costs something even so, and so does writing.
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
from benchmarks.report import check_output, machine, one_line, refuse, say, table, write_json
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
"""Steps before the clock starts; the first of them compiles."""
AHEAD = 4
"""Steps that the host may be ahead of the device, as in the loop."""
NEVER = 10**6


class Setting(NamedTuple):
    """Settings of a run besides its steps."""

    title: str
    adapters: int
    log_every: int
    save_every: int


class Timing(NamedTuple):
    """Seconds a step: on the clock, and of the loop's thread on a processor."""

    wall: float
    host: float


def settings_of(args: argparse.Namespace) -> list[Setting]:
    return [
        Setting("steps only", 1, args.log_every, NEVER),
        Setting("a line each step", 1, 1, NEVER),
        Setting(f"a state every {args.save_every} steps", 1, args.log_every, args.save_every),
        Setting(f"{args.adapters} adapters", args.adapters, args.log_every, NEVER),
    ]


class Bare:
    """The compiled step alone, on one batch that lies on the device."""

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
        """Seconds a step."""
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
    """A whole run; times of its steps after the first ones."""
    stamps: dict[int, tuple[float, float]] = {}

    def listen(line: str) -> None:
        # A line on a step is said as soon as its metrics are there.
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
    config = run_config(
        folder,
        setting.adapters,
        args.rows,
        {"max_length": args.length},
        training={"steps": WARM_UP + args.steps, "log_every": setting.log_every},
        checkpoints={"every": setting.save_every, "keep": 2},
    )
    bare = Bare(config)
    pairs = [(bare.seconds(args.steps), run(config)) for _ in range(args.repeats)]
    return {
        **setting._asdict(),
        "loop_to_step": spread([loop.wall / alone for alone, loop in pairs])._asdict(),
        "step_seconds": spread([alone for alone, _ in pairs])._asdict(),
        "loop_seconds": spread([loop.wall for _, loop in pairs])._asdict(),
        "host_seconds": spread([loop.host for _, loop in pairs])._asdict(),
    }


def shown(figure: dict[str, Any]) -> list[str]:
    ratio = figure["loop_to_step"]
    names = ("step_seconds", "loop_seconds", "host_seconds")
    return [
        figure["title"],
        f"{ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})",
        *(f"{1e3 * figure[name]['median']:.2f} ms" for name in names),
    ]


def require_whole_numbers(args: argparse.Namespace) -> None:
    for name in ("rows", "length", "adapters", "log_every", "save_every", "repeats"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be positive")
    if args.steps < 2 * args.log_every:
        raise ConfigError(
            f"--steps: two lines of --log-every {args.log_every} steps have to fit in; give "
            f"{2 * args.log_every} or more"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", default="tiny", help=SIZE_HELP)
    parser.add_argument("--rows", type=int, default=8, help="rows of each adapter in a step (8)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row, at most (64)")
    parser.add_argument("--adapters", type=int, default=4, help="where there are several (4)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between two lines (10)")
    parser.add_argument("--save-every", type=int, default=10, help="steps between two states (10)")
    parser.add_argument("--steps", type=int, default=100, help="that are timed (100)")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs (5)")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        check_output(args.output)
        require_whole_numbers(args)
        model_of(args.size)
        facts = machine()
        print(f"{args.size} base, {args.rows} x {args.length} tokens an adapter; {one_line(facts)}")
        figures = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_base(folder / BASE, args.size)
            write_rows(folder / ROWS, 2000)
            for setting in settings_of(args):
                say(f"measuring: {setting.title}")
                figures.append(measure(setting, folder, args))
        headings = ("the loop", "loop / step", "step", "loop", "host")
        print(table(headings, [shown(figure) for figure in figures]))
        write_json(args.output, args, benchmark="loop", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
