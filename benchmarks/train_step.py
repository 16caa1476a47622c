"""Speed and memory of a training step with MixLoRA, LoRA, no adapter, and peft's LoRA.

    python benchmarks/train_step.py --size d512 --peft --output train_step.json
    python benchmarks/train_step.py --size 7b --dtype bfloat16 --rows 1 --length 2048 --rank 16 \
        --attention cudnn

A model of random weights is trained with each method alternately, so that disturbances affect all
methods. LoRA has equal trainable parameters. Each round also times a product of large matrices, to
compare the speed of a step with. `frozen` is the lower bound: forward and backward to the embedding
without an adapter. With `--peft`, peft's LoRA is trained in PyTorch on the same weights and tokens,
in a separate process; its first loss must equal that of `lora`. It checkpoints its layers if
`--remat` is `full`.

Columns: trainable parameters; seconds of a step, median and range; median ratio to LoRA; tokens per
second; FLOP/s and their share of the matrix product's, counted by XLA (with recomputation and
adapters) and as needed by every method (`needed_of_frozen`); seconds of tracing and compiling;
compiled FLOPs; MiB of the compiled program's arguments and temporaries; peak memory of a process
with only these steps.

Needs jax, flax, optax and numpy; for `--peft` also torch, transformers and peft.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak_memory import PeakMemory
from benchmarks.peft_process import check_python
from benchmarks.random_inputs import params_of
from benchmarks.report import (
    MEBIBYTE,
    check_output,
    check_positive,
    machine,
    one_line,
    refuse,
    say,
    table,
    without_compilation_cache,
    write_json,
)
from benchmarks.sizes import SIZE_HELP, model_of
from benchmarks.step_comparison import PEFT, StepComparison
from benchmarks.timing import OUT_OF_MEMORY
from benchmarks.training_steps import (
    FROZEN,
    LORA,
    NAMES,
    compiled_step,
    method_named,
    needed_of_frozen,
    run_config,
)
from moe_jax.config.model import ComputeConfig, FloatType, StorageType
from moe_jax.errors import ConfigError, UserError, is_out_of_memory


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--size", default="d512", help=SIZE_HELP)
    add("--vocab", type=int, help="number of tokens of the vocabulary (the size's)")
    add(
        "--methods",
        default="frozen,lora,mixlora",
        help=f"methods among {', '.join(NAMES)} (%(default)s)",
    )
    add("--peft", action="store_true", help="compare with peft's LoRA in PyTorch")
    add("--peft-python", default=sys.executable, help="interpreter with torch and peft (this one)")
    add("--dtype", default="float32", choices=get_args(FloatType), help="compute dtype")
    add(
        "--param-dtype", choices=get_args(StorageType), help="dtype of the frozen weights (--dtype)"
    )
    add("--rows", type=int, default=8, help="number of rows of a step (8)")
    add("--length", type=int, default=128, help="number of tokens of a row (128)")
    add("--micro-batches", type=int, default=1, help="number of micro-batches of a step (1)")
    add("--rank", type=int, default=8, help="rank on attention and of each expert (8)")
    add("--experts", type=int, default=8, help="number of experts, and factor of LoRA's rank (8)")
    add("--top-k", type=int, default=2, help="number of experts of a token (2)")
    default = ComputeConfig(dtype="float32")
    add("--remat", default=default.remat, help="ComputeConfig.remat (%(default)s)")
    add("--attention", default=default.attention, help="ComputeConfig.attention (%(default)s)")
    add("--mesh", help="mesh as AXIS=N,... with the axes data, fsdp, tensor (one device)")
    add("--rounds", type=int, default=10, help="number of timed steps of each method (10)")
    add("--no-peak", action="store_true", help="no processes to measure peak memory")
    add("--output", type=Path, help="JSON file for the figures")
    add("--measure-peak", metavar="METHOD", help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> list[str]:
    """Checks the flags before compiling; returns the methods to measure.

    Raises:
      UserError: a flag or field is invalid.
    """
    check_output(args.output)
    check_positive(args, ("rows", "length", "rank", "experts", "top_k", "rounds", "micro_batches"))
    names = list(dict.fromkeys(filter(None, args.methods.split(","))))
    if not names:
        raise ConfigError("--methods: names no method")
    for name in names:
        run_config(method_named(LORA if name == FROZEN else name, args), args)
    if args.peft:
        if LORA not in names:
            raise ConfigError(f"--peft: is compared with {LORA!r}; name it in --methods")
        if args.param_dtype not in (None, args.dtype) or args.mesh:
            raise ConfigError("--peft: cannot be used with --param-dtype or --mesh; leave them out")
        check_python(args.peft_python)
    return names


def peak_of(name: str, argv: Sequence[str]) -> tuple[int | None, str | None]:
    """Measures peak memory in a process with the steps of one method; returns it or an error."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--measure-peak", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == -9:  # killed by Linux, out of memory
        return None, OUT_OF_MEMORY
    if done.returncode == 2:  # the error is already printed
        raise SystemExit(2)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed; see above")
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["peak_bytes"], answer["error"]


def measure_peak(args: argparse.Namespace) -> None:
    """Runs the process that `peak_of` starts; prints its peak memory as JSON."""
    answer: dict[str, Any] = {"peak_bytes": None, "error": None}
    try:
        step = compiled_step(args.measure_peak, args)
        step.compile()
        peak = PeakMemory(step.program.mesh.devices.flatten().tolist())
        run = step.begin(step, params_of(step.program))
        run()
        run()
        answer["peak_bytes"] = peak.bytes()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer["error"] = OUT_OF_MEMORY
    print(json.dumps(answer))


def measure(args: argparse.Namespace, names: Sequence[str], argv: Sequence[str]) -> dict[str, Any]:
    """Measures all methods; returns the figures as written to the file."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, row in rows.items():
        if not args.no_peak:
            say(f"{name}: peak memory")
            row["peak_bytes"], row["error"] = peak_of(name, argv)
    facts = machine()
    comparison = StepComparison(args, rows | ({PEFT: {}} if args.peft else {}))
    steps = {}
    for name in filter(comparison.is_running, names):
        say(f"{name}: compiling")
        steps[name] = comparison.prepare(name)
    with contextlib.ExitStack() as stack:
        if args.peft:
            say("peft: starting")
            comparison.prepare_peft(steps.get(LORA), stack)
        say(f"{args.rounds} rounds")
        comparison.run(args.rounds)
    return {
        "benchmark": "train_step",
        "machine": facts,
        "tokens": args.rows * args.length,
        "needed_flops": needed_of_frozen(model_of(args.size, args.vocab), args.rows, args.length),
        "matrix_product": {
            "width": comparison.product.width,
            "flops_per_second": comparison.rate._asdict(),
        },
        "rows": list(comparison.rows.values()),
    }


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("method", lambda row: row["method"]),
    ("trained", lambda row: _number(row.get("trainable_parameters"), ",.0f")),
    ("s/step", lambda row: _number(row["seconds"]["median"], ".4g")),
    (
        "(from to)",
        lambda row: f"({row['seconds']['lowest']:.4g} {row['seconds']['highest']:.4g})",
    ),
    ("/ lora", lambda row: _number((row["ratio_to_lora"] or {}).get("median"), ".3f")),
    ("tokens/s", lambda row: _number(row["tokens_per_second"], ".1f")),
    ("TFLOP/s", lambda row: _number(row["flops_per_second"], ".4g", 1e12)),
    ("share", lambda row: _number(row["share_of_product"], ".1%")),
    ("needed/s", lambda row: _number(row["needed_flops_per_second"], ".4g", 1e12)),
    ("share", lambda row: _number(row["needed_share_of_product"], ".1%")),
    ("trace s", lambda row: _number(row.get("trace_seconds"), ".1f")),
    ("compile s", lambda row: _number(row.get("compile_seconds"), ".1f")),
    ("GFLOP", lambda row: _number(row.get("compiled_flops"), ".5g", 1e9)),
    ("arg. MiB", lambda row: _number(row.get("argument_bytes"), ".1f", MEBIBYTE)),
    ("temp. MiB", lambda row: _number(row.get("temporary_bytes"), ".1f", MEBIBYTE)),
    ("peak MiB", lambda row: _number(row.get("peak_bytes"), ".1f", MEBIBYTE)),
)


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else format(value / unit, form)


def as_table(figures: dict[str, Any]) -> str:
    """Formats the figures as a table."""
    rows = [row for row in figures["rows"] if row["error"] is None]
    cells = [[cell(row) for _, cell in COLUMNS] for row in rows]
    lines = [table([heading for heading, _ in COLUMNS], cells)]
    lines += [f"{row['method']}: {row['error']}" for row in figures["rows"] if row["error"]]
    rate = figures["matrix_product"]["flops_per_second"]
    lines.append(
        f"matrix product: {rate['median'] / 1e12:.4g} TFLOP/s "
        f"({rate['lowest'] / 1e12:.4g} {rate['highest'] / 1e12:.4g}); a step needs "
        f"{figures['needed_flops'] / 1e9:.5g} GFLOP"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    # jax reads these at the first use of a device. With peft, two processes share a GPU.
    share = {"PREALLOCATE": "false"} if args.peft else {"MEM_FRACTION": "0.95"}
    for name, value in share.items():
        os.environ.setdefault(f"XLA_PYTHON_CLIENT_{name}", value)
    try:
        if args.measure_peak:
            with without_compilation_cache():
                measure_peak(args)
            return 0
        names = check(args)
        with without_compilation_cache():
            figures = measure(args, names, argv)
        print(
            f"{args.size} in {args.dtype}, {args.rows} x {args.length} tokens, remat {args.remat}, "
            f"attention {args.attention}; {one_line(figures['machine'])}"
        )
        print(as_table(figures))
        write_json(args.output, args, **figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
