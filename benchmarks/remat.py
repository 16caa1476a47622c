"""FLOPs and memory of each rematerialization policy at 7B, read from compiled programs.

    python benchmarks/remat.py --output benchmarks/remat.md
    python benchmarks/remat.py --compile-for v5p

The training steps of `configs/llama7b_mixlora.py` and of `configs/llama7b_lora.py`, with equal
trainable parameters, are compiled for one device and one row of 2048 tokens, from shapes without
weights. FLOPs include all iterations of all loops; memory is the peak of temporaries. The steps
compute in float32, since a CPU multiplies bfloat16 with float32 copies of the weights, which an
accelerator does not need. In bfloat16, kept activations take half the memory.
`tests/benchmarks/test_remat.py` checks the table.

With `--compile-for`, the steps are compiled for a TPU chip in bfloat16. This needs the package
`libtpu` and two minutes for each program, but no TPU. No test repeats it.

Runs without an accelerator and without a network.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compiled_flops import compiled_flops
from benchmarks.report import check_output, refuse, say
from moe_jax.adapters import METHODS
from moe_jax.compiled.chips import CHIPS
from moe_jax.compiled.target import target_devices
from moe_jax.config.run import MeshConfig, RunConfig, parse_run_config
from moe_jax.errors import DeviceError, UserError, is_out_of_memory
from moe_jax.hf.config import model_config_from_hf
from moe_jax.models.remat import REMAT_POLICIES
from moe_jax.training.step.program import build_program

LENGTH = 2048
CONFIGS = {"LoRA": "llama7b_lora", "MixLoRA": "llama7b_mixlora"}
POLICIES = ("none", *REMAT_POLICIES)
TPUS = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]


class StepCost(NamedTuple):
    """Cost of one compiled step.

    Attributes:
      flops: FLOPs of a step.
      temporary: bytes of temporaries.
      arguments: bytes of weights, adapters and optimizer state.
    """

    flops: float
    temporary: int
    arguments: int


def step_cost(method: str, policy: str, chip: Any = None) -> StepCost:
    """Compiles a training step and counts its cost.

    Args:
      method: one of `CONFIGS`.
      policy: one of `POLICIES`.
      chip: TPU to compile for, in bfloat16; None for this machine, in float32.
    """
    module = importlib.import_module(f"configs.{CONFIGS[method]}")
    config = parse_run_config(module.get_config(), METHODS)
    (name, adapter), *_ = config.adapters.items()
    model = model_config_from_hf(config.base.hf_config or {}, "config.base.hf_config")
    config = _one_row(config, name, adapter, policy, "float32" if chip is None else "bfloat16")
    devices = jax.devices()[:1] if chip is None else [chip]
    program = build_program(config, model, total_steps=100, devices=devices)
    compiled = program.lower_train_step(LENGTH).compile()
    flops = compiled_flops(compiled, fixed_loops=True)
    memory = compiled.memory_analysis()
    assert not flops.unknown_loops
    assert memory is not None
    return StepCost(flops.total, memory.temp_size_in_bytes, memory.argument_size_in_bytes)


def _one_row(config: RunConfig, name: str, adapter: Any, policy: str, dtype: Any) -> RunConfig:
    compute = dataclasses.replace(
        config.compute,
        dtype=dtype,
        attention="xla",
        remat=policy,
    )
    return dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, param_dtype=dtype),
        compute=compute,
        mesh=MeshConfig(data=1),
        training=dataclasses.replace(config.training, micro_batches=1),
        adapters={name: dataclasses.replace(adapter, batch_size=1)},
    )


COLUMNS = ("TFLOP, LoRA", "TFLOP, MixLoRA", "ratio", "GiB, LoRA", "GiB, MixLoRA", "ratio")


def table_row(lora: StepCost, mixlora: StepCost) -> list[float]:
    """Figures of one policy, in the order of `COLUMNS`."""
    return [
        lora.flops / 1e12,
        mixlora.flops / 1e12,
        mixlora.flops / lora.flops,
        lora.temporary / 2**30,
        mixlora.temporary / 2**30,
        mixlora.temporary / lora.temporary,
    ]


HEADER = """\
Written by `python benchmarks/remat.py {flags}`{check}.
One row of {length} tokens, one device, float32 (in bfloat16 kept activations take half the memory),
as compiled by XLA for a CPU."""

LOSS = """

The loss does not contribute to the peak, which is in the backward pass of a layer: with the logits
of all positions (250 MiB, and 250 MiB for their gradients) `full` takes the same memory as with the
chunked loss. The chunked loss alone takes 125 MiB instead of 500."""

TPU_HEADER = """\
Written by `python benchmarks/remat.py --compile-for {flags}`
on {date} with jax {jax} and libtpu {libtpu}; no test repeats it, and nothing was run. One row
of {length} tokens, bfloat16, as compiled by XLA for one TPU of {memory} GiB. Weights, adapters
and optimizer state take another {arguments:.2f} GiB (LoRA {lora_arguments:.2f})."""


def as_markdown(costs: dict[str, list[StepCost] | None], generation: str | None = None) -> str:
    """Formats the table as Markdown.

    Args:
      costs: costs of `CONFIGS` by policy; None if the chip has too little memory.
      generation: generation of the TPU; None for this machine.
    """
    subset = [] if len(costs) == len(POLICIES) else ["--policies", *costs]
    if generation is None:
        flags = " ".join(subset) or "--output benchmarks/remat.md"
        check = "" if subset else " and checked by a test"
        header = HEADER.format(flags=flags, check=check, length=LENGTH) + ("" if subset else LOSS)
    else:
        arguments = [cost.arguments / 2**30 for both in costs.values() for cost in both or ()]
        header = TPU_HEADER.format(
            flags=" ".join([generation, *subset]),
            date=datetime.datetime.now(datetime.UTC).date(),
            jax=jax.__version__,
            libtpu=importlib.metadata.version("libtpu"),
            length=LENGTH,
            memory=CHIPS[generation].memory_bytes // 2**30,
            lora_arguments=arguments[0],
            arguments=arguments[1],
        )
    lines = [
        "# Rematerialization of a 7B step: operations and memory",
        "",
        header,
        "",
        f"| remat | {' | '.join(COLUMNS)} |",
        f"| --- |{' ---: |' * len(COLUMNS)}",
    ]
    for policy, both in costs.items():
        cells = [f"{x:.3f}" for x in table_row(*both)] if both else ["does not fit"]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument(
        "--compile-for",
        choices=TPUS,
        metavar="CHIP",
        help=f"TPU to compile for with libtpu: {', '.join(TPUS)} (this machine)",
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=POLICIES,
        default=POLICIES,
        help="policies to compile (all)",
    )
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
        chip = target_devices(args.compile_for)[0] if args.compile_for else None
    except UserError as error:
        return refuse(error)
    costs: dict[str, list[StepCost] | None] = {}
    for policy in args.policies:
        say(f"{policy}: compiling")
        try:
            costs[policy] = [step_cost(method, policy, chip) for method in CONFIGS]
        except jax.errors.JaxRuntimeError as error:
            if chip is None or not is_out_of_memory(error):
                raise
            costs[policy] = None
    if not any(costs.values()):
        return refuse(
            DeviceError("--compile-for: every policy needs more memory than the chip has")
        )
    text = as_markdown(costs, args.compile_for)
    print(text)
    if args.output:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
