"""Estimated time of a training step on a GPU or TPU, from the program compiled for it.

    python benchmarks/gpu_step.py
    python benchmarks/gpu_step.py --methods mixlora,lora,frozen --rows 4 --kinds --output FILE.json
    python benchmarks/gpu_step.py --compile-for v5p --attention xla --rows 4 --devices 4

The step of each method is compiled from shapes for a chip that need not be present, and
`moe_jax.compiled.roofline` models its time kernel by kernel. Nothing runs on the chip: the times
are estimates that rank programs for the same chip. `benchmarks/train_step.py` measures a step;
`moe-jax plan --compile-for` prints the same estimate for the step of a configuration.

Columns: estimated milliseconds of a step; the share of this time that the operations of
`needed_of_frozen` take at the rate of a large product; kernel launches; TFLOP of matrix products
and attention, with recomputation; GB that kernels read and write by the model, and by XLA's coarser
count; GiB of the program's arguments, temporaries and peak; seconds of tracing and compiling. All
are of one chip. The temporaries do not include the workspaces that cuDNN allocates at run time.

Needs Linux, flax, optax, and jax with its CUDA plugin (`pip install 'jax[cuda13]'`) or with libtpu
(`pip install 'jax[tpu]'`). Runs without an accelerator and without a network.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from benchmarks import training_steps
from benchmarks.compiled_flops import compiled_flops
from benchmarks.report import (
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
from benchmarks.training_steps import (
    FROZEN,
    LORA,
    NAMES,
    method_named,
    needed_of_frozen,
    run_config,
)
from moe_jax.compiled.chips import CHIPS, chip_named
from moe_jax.compiled.estimate import estimate as estimate_program
from moe_jax.compiled.roofline import Roofline, Totals, grouped
from moe_jax.compiled.target import compiler_version, target_devices
from moe_jax.config.model import ComputeConfig, StorageType
from moe_jax.config.run import RunConfig
from moe_jax.errors import ConfigError, UserError
from moe_jax.sharding.compiler_options import compiler_options
from moe_jax.sharding.mesh import platform_of
from moe_jax.training.step.program import build_program


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--size", default="7b", help=SIZE_HELP)
    add("--vocab", type=int, help="number of tokens of the vocabulary (the size's)")
    add("--methods", default="mixlora,lora", help=f"methods among {', '.join(NAMES)} (%(default)s)")
    # The model's rates are those of products in half precision.
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="compute dtype")
    add(
        "--param-dtype", choices=get_args(StorageType), help="dtype of the frozen weights (--dtype)"
    )
    add("--rows", type=int, default=1, help="number of rows of a step (1)")
    add("--length", type=int, default=2048, help="number of tokens of a row (2048)")
    add("--micro-batches", type=int, default=1, help="number of micro-batches of a step (1)")
    add("--rank", type=int, default=16, help="rank on attention and of each expert (16)")
    add("--experts", type=int, default=8, help="number of experts, and factor of LoRA's rank (8)")
    add("--top-k", type=int, default=2, help="number of experts of a token (2)")
    add("--dropout", type=float, default=0.0, help="dropout of the pairs (0)")
    default = ComputeConfig(dtype="bfloat16")
    add("--remat", default=default.remat, help="ComputeConfig.remat (%(default)s)")
    add("--attention", default="cudnn", help="ComputeConfig.attention (%(default)s)")
    add("--expert-kernel", default=default.experts, help="ComputeConfig.experts (%(default)s)")
    add(
        "--compile-for",
        default="h200",
        metavar="CHIP",
        help=f"chip among {', '.join(CHIPS)} (h200)",
    )
    add(
        "--dynamic-slice-fusion",
        choices=("on", "off"),
        help="XLA's fusion of products with slices of the stacked layers (as in training)",
    )
    add("--kinds", action="store_true", help="table of the kinds of kernels of each method")
    add("--top", type=int, default=0, metavar="N", help="table of the N longest groups of kernels")
    add("--hlo", type=Path, metavar="FOLDER", help="folder for the compiled programs")
    add("--output", type=Path, help="JSON file for the figures")
    add("--devices", type=int, default=1, help="number of chips, which share the weights (1)")
    return parser


def check(args: argparse.Namespace) -> list[str]:
    """Checks the flags before compiling; returns the methods to compile.

    Raises:
      UserError: a flag or field is invalid.
    """
    check_output(args.output)
    if args.hlo and not args.hlo.is_dir():
        raise ConfigError(f"--hlo {args.hlo}: there is no such folder")
    check_positive(args, ("rows", "length", "rank", "experts", "top_k", "micro_batches", "devices"))
    args.mesh = f"data=1,fsdp={args.devices}"
    if args.top < 0:
        raise ConfigError("--top: must not be negative")
    names = list(dict.fromkeys(filter(None, args.methods.split(","))))
    if not names:
        raise ConfigError("--methods: names no method")
    for name in names:
        _config_of(name, args)
    return names


def _config_of(name: str, args: argparse.Namespace) -> RunConfig:
    """Configuration of a run; for the frozen model, that of a LoRA adapter."""
    return run_config(method_named(LORA if name == FROZEN else name, args), args)


def lowered_step(name: str, args: argparse.Namespace, devices: Sequence[Any]) -> jax.stages.Lowered:
    """Traces the step of a method, or of the frozen model without adapters.

    Raises:
      UserError: the chip does not support the flags.
    """
    config = _config_of(name, args)
    steps = config.training.steps or 1
    program = build_program(config, model_of(args.size, args.vocab), steps, devices)
    if name == FROZEN:
        return training_steps._lower_frozen(program, args)
    return program.lower_train_step(args.length)


def compile_options(args: argparse.Namespace, chip: Any) -> dict[str, Any]:
    """Returns XLA's compiler options, which all programs have, unless a flag differs."""
    options = compiler_options(chip)
    if args.dynamic_slice_fusion and platform_of([chip]) == "gpu":
        options["xla_gpu_enable_dynamic_slice_fusion"] = args.dynamic_slice_fusion == "on"
    return options


def estimate(
    name: str, args: argparse.Namespace, devices: Sequence[Any]
) -> tuple[dict[str, Any], Roofline]:
    """Returns the figures of one method and its roofline model."""
    start = time.perf_counter()
    lowered = lowered_step(name, args, devices)
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=compile_options(args, devices[0]))
    end = time.perf_counter()
    chip = chip_named(args.compile_for)
    if args.hlo:
        (args.hlo / f"{name}.hlo").write_text(compiled.as_text() or "")
    program = estimate_program(compiled, chip, args.dtype)
    total = program.model.total
    needed = needed_of_frozen(model_of(args.size, args.vocab), args.rows, args.length)
    needed_seconds = needed / args.devices / chip.rates_of(args.dtype).product
    return {
        "method": name,
        "modeled_seconds": total.seconds,
        "needed_share": needed_seconds / total.seconds,
        "kernels": total.kernels,
        "flops": total.flops,
        "moved_bytes": total.moved,
        "moved_bytes_by_xla": compiled_flops(compiled, fixed_loops=True).moved,
        "loops_of_unknown_length": program.model.unknown_loops,
        "argument_bytes": program.memory.arguments,
        "temporary_bytes": program.memory.temporary,
        "peak_bytes": program.memory.peak,
        "trace_seconds": middle - start,
        "compile_seconds": end - middle,
        "kinds": {kind: sums._asdict() for kind, sums in program.model.kinds.items()},
    }, program.model


COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("method", lambda row: row["method"]),
    ("model ms", lambda row: f"{row['modeled_seconds'] * 1e3:.1f}"),
    ("needed", lambda row: f"{row['needed_share']:.1%}"),
    ("kernels", lambda row: f"{row['kernels']}"),
    ("TFLOP", lambda row: f"{row['flops'] / 1e12:.2f}"),
    ("GB moved", lambda row: f"{row['moved_bytes'] / 1e9:.1f}"),
    ("by XLA", lambda row: f"{row['moved_bytes_by_xla'] / 1e9:.1f}"),
    ("arg. GiB", lambda row: f"{row['argument_bytes'] / 2**30:.2f}"),
    ("temp. GiB", lambda row: f"{row['temporary_bytes'] / 2**30:.2f}"),
    ("peak GiB", lambda row: f"{row['peak_bytes'] / 2**30:.2f}"),
    ("trace s", lambda row: f"{row['trace_seconds']:.1f}"),
    ("compile s", lambda row: f"{row['compile_seconds']:.1f}"),
)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the figures as a table."""
    lines = [
        table([head for head, _ in COLUMNS], [[cell(row) for _, cell in COLUMNS] for row in rows])
    ]
    for row in rows:
        if row["loops_of_unknown_length"]:
            count = row["loops_of_unknown_length"]
            lines.append(
                f"{row['method']}: {count} loops of unknown length are counted as one round"
            )
    return "\n".join(lines)


def breakdown(first: str, groups: dict[str, Totals]) -> str:
    """Sums over groups of kernels as a table."""
    cells = [
        [
            name,
            f"{sums.seconds * 1e3:.2f}",
            f"{sums.kernels}",
            f"{sums.flops / 1e12:.2f}",
            f"{sums.moved / 1e9:.1f}",
        ]
        for name, sums in groups.items()
    ]
    return table([first, "model ms", "kernels", "TFLOP", "GB moved"], cells)


def details(name: str, model: Roofline, args: argparse.Namespace) -> list[str]:
    """Tables requested by `--kinds` and `--top`."""
    tables = []
    if args.kinds:
        tables.append(breakdown(f"{name}: kind", model.kinds))
    if args.top:
        groups = grouped(
            model.kernels,
            lambda kernel: f"{kernel.kind}, {kernel.result[:40]}, {_short(kernel.origin)}",
        )
        longest = dict(list(groups.items())[: args.top])
        tables.append(breakdown(f"{name}: kernels", longest))
    return tables


def _short(origin: str) -> str:
    """End of an operation's name, without the parts that all names share."""
    return re.sub(r"jit\(\w+\)/|while/body/|eval_jaxpr/|closed_call/", "", origin)[-80:]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        names = check(args)
        devices = target_devices(args.compile_for, args.devices)
        rows, tables = [], []
        with without_compilation_cache():
            for name in names:
                say(f"{name}: compiling")
                row, model = estimate(name, args, devices)
                rows.append(row)
                tables += details(name, model, args)
        facts = machine()
        chip = chip_named(args.compile_for)
        plugin = compiler_version(chip.platform)
        compiler = {"chip": devices[0].device_kind, "devices": len(devices), "plugin": plugin}
        print(
            f"estimate for {len(devices)} x {compiler['chip']}, compiled by {compiler['plugin']}, "
            f"nothing was run: {args.size} in {args.dtype}, {args.rows} x {args.length} tokens, "
            f"remat {args.remat}, attention {args.attention}; {one_line(facts)}"
        )
        print("\n\n".join([as_table(rows), *tables]))
        write_json(
            args.output,
            args,
            benchmark="gpu_step",
            is_estimate=True,
            compiled_for=compiler,
            rates=vars(chip.rates_of(args.dtype)),
            machine=facts,
            rows=rows,
        )
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
