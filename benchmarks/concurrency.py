"""Several small-batch adapters in one step against one after another.

    python benchmarks/concurrency.py --output concurrency.json

N adapters, each with a few rows of its own, train on one frozen base of random weights: all in one
compiled step, or each in a step of its own, N steps. Both are timed in turn in one process, so that
only their ratio is quoted. The memory is the compiled program's own account of it.

Needs jax, flax, optax and numpy only.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.random_inputs import params_of, random_batch
from benchmarks.report import MEBIBYTE, check_output, machine, one_line, refuse, write_json
from benchmarks.sizes import SIZE_HELP, model_of
from moe_jax.adapters import METHODS
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.config.run import parse_run_config
from moe_jax.errors import ConfigError, UserError
from moe_jax.training.step.program import Program, build_program

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "mixlora": {"name": "mixlora", "num_experts": 8, "router": {"name": "top_k", "top_k": 2}},
}


def program_of(kind: str, adapters: int, args: argparse.Namespace) -> Program:
    """Training program of several adapters of one kind."""
    method = {**KINDS[kind], "rank": args.rank, "alpha": 16.0, "target_modules": TARGET_MODULES}
    data = {"train": {"none": {"path": "none", "schema": "text"}}, "max_length": args.length}
    adapter = {
        "method": method,
        "data": data,
        "optimizer": {"learning_rate": 1e-4},
        "batch_size": args.rows,
    }
    raw = {
        "base": {"path": "random", "param_dtype": args.dtype},
        "compute": {"dtype": args.dtype},
        "training": {"steps": 1000},
        "adapters": {f"adapter{i}": adapter for i in range(adapters)},
    }
    config = parse_run_config(raw, METHODS)
    return build_program(config, model_of(args.size), 1000, devices=jax.devices()[:1])


def step_of(program: Program, params: Any, length: int) -> Callable[[], None]:
    """A function that does one training step and waits for it."""
    rows = sum(segment.total for segment in program.adapter_rows)
    batch = program.put_train_batch(random_batch(program.model.config, rows, length))
    box = [program.init_state(params)]

    def step() -> None:
        box[0], metrics = program.train_step(box[0], params, batch)
        jax.block_until_ready((box[0], metrics))

    return step


def memory_of(program: Program, length: int) -> float:
    """MiB that the compiled step takes, base included."""
    analysis: Any = program.compiled_train_step(length).memory_analysis()
    held = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return (held + analysis.output_size_in_bytes - analysis.alias_size_in_bytes) / MEBIBYTE


def measure(kind: str, counts: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    alone = program_of(kind, 1, args)
    params = params_of(alone)
    memory_alone = memory_of(alone, args.length)
    step_alone = step_of(alone, params, args.length)
    step_alone()
    results = []
    for count in counts:
        together = program_of(kind, count, args)
        step = step_of(together, params, args.length)
        step()
        ratios, seconds = [], []
        for _ in range(args.repeats):
            start = time.perf_counter()
            for _ in range(count):
                step_alone()
            middle = time.perf_counter()
            step()
            end = time.perf_counter()
            ratios.append((middle - start) / (end - middle))
            seconds.append(end - middle)
        memory = memory_of(together, args.length)
        results.append(
            {
                "kind": kind,
                "adapters": count,
                "speedup": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "seconds_per_step": statistics.median(seconds),
                "memory_mib": memory,
                # What each adapter beyond the first adds.
                "mib_per_adapter": (memory - memory_alone) / (count - 1) if count > 1 else None,
            }
        )
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", default="d512", help=SIZE_HELP)
    parser.add_argument("--counts", default="1,2,4,8", help="numbers of adapters (1,2,4,8)")
    parser.add_argument("--rows", type=int, default=1, help="rows of each adapter in a step (1)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (64)")
    parser.add_argument("--rank", type=int, default=8, help="of every pair (8)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs (7)")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
        model_of(args.size)
        if not all(count.isdigit() and int(count) for count in args.counts.split(",")):
            raise ConfigError(f"--counts {args.counts}: expected N,... with whole numbers")
        facts = machine()
        print(
            f"{args.size} base in {args.dtype}, {args.rows} x {args.length} tokens an adapter; "
            f"{one_line(facts)}"
        )
        print("kind     adapters  one after another / together  step       memory     per adapter")
        figures = []
        for kind in KINDS:
            for row in measure(kind, [int(count) for count in args.counts.split(",")], args):
                figures.append(row)
                spread = f"{row['speedup']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
                each = row["mib_per_adapter"]
                print(
                    f"{kind:8} {row['adapters']:8}  {spread:28}  {row['seconds_per_step']:7.3f} s  "
                    f"{row['memory_mib']:6.0f} MiB  {'' if each is None else f'{each:6.1f} MiB'}"
                )
        write_json(args.output, args, benchmark="concurrency", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
