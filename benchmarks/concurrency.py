"""Speed and memory of training several small-batch adapters in one step.

    python benchmarks/concurrency.py --output concurrency.json

N adapters, each with a few rows, train on one frozen base of random weights, either in one compiled
step for all of them or in N steps with one adapter each. Both are timed alternately in one process
and compared by their ratio. Memory is read from the compiled program.

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
from moe_jax.compiled.estimate import program_memory
from moe_jax.config.run import parse_run_config
from moe_jax.errors import ConfigError, UserError
from moe_jax.training.step.program import Program, build_program

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "mixlora": {"name": "mixlora", "num_experts": 8, "router": {"name": "top_k", "top_k": 2}},
}


def program_of(kind: str, adapters: int, args: argparse.Namespace) -> Program:
    """Builds the training program of several adapters of one kind."""
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
    """Returns a function that runs one training step and waits for it."""
    rows = sum(segment.total for segment in program.adapter_rows)
    batch = program.put_train_batch(random_batch(program.model.config, rows, length))
    box = [program.init_state(params)]

    def step() -> None:
        box[0], metrics = program.train_step(box[0], params, batch)
        jax.block_until_ready((box[0], metrics))

    return step


def memory_of(program: Program, length: int) -> float:
    """Memory of the compiled step in MiB, with the base."""
    return program_memory(program.compiled_train_step(length)).peak / MEBIBYTE


def measure(kind: str, counts: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times adapters of one kind, at each number of adapters."""
    one_adapter = program_of(kind, 1, args)
    params = params_of(one_adapter)
    memory_of_one = memory_of(one_adapter, args.length)
    single_step = step_of(one_adapter, params, args.length)
    single_step()
    results = []
    for count in counts:
        program = program_of(kind, count, args)
        step = step_of(program, params, args.length)
        step()
        ratios, seconds = [], []
        for _ in range(args.repeats):
            start = time.perf_counter()
            for _ in range(count):
                single_step()
            middle = time.perf_counter()
            step()
            end = time.perf_counter()
            ratios.append((middle - start) / (end - middle))
            seconds.append(end - middle)
        memory = memory_of(program, args.length)
        results.append(
            {
                "kind": kind,
                "adapters": count,
                "speedup": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "seconds_per_step": statistics.median(seconds),
                "memory_mib": memory,
                # Memory of each adapter beyond the first.
                "mib_per_adapter": (memory - memory_of_one) / (count - 1) if count > 1 else None,
            }
        )
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", default="d512", help=SIZE_HELP)
    parser.add_argument("--counts", default="1,2,4,8", help="numbers of adapters (1,2,4,8)")
    parser.add_argument(
        "--rows", type=int, default=1, help="number of rows of each adapter in a step (1)"
    )
    parser.add_argument("--length", type=int, default=64, help="number of tokens of a row (64)")
    parser.add_argument("--rank", type=int, default=8, help="rank of every pair (8)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="number of timed pairs (7)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
        model_of(args.size)
        if not all(count.isdigit() and int(count) for count in args.counts.split(",")):
            raise ConfigError(
                f"--counts {args.counts}: expected whole numbers, separated by commas"
            )
        facts = machine()
        print(
            f"{args.size} base in {args.dtype}, {args.rows} x {args.length} tokens per adapter; "
            f"{one_line(facts)}"
        )
        print("kind     adapters  one after another / together  step       memory     per adapter")
        figures = []
        for kind in KINDS:
            for row in measure(kind, [int(count) for count in args.counts.split(",")], args):
                figures.append(row)
                spread = f"{row['speedup']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
                added = row["mib_per_adapter"]
                print(
                    f"{kind:8} {row['adapters']:8}  {spread:28}  {row['seconds_per_step']:7.3f} s  "
                    f"{row['memory_mib']:6.0f} MiB  {'' if added is None else f'{added:6.1f} MiB'}"
                )
        write_json(args.output, args, benchmark="concurrency", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
