"""What each policy of rematerialisation costs and saves at 7B: read from compiled programs.

    python benchmarks/remat.py --output benchmarks/remat.md

The training step of `configs/llama7b_mixlora.py` is compiled for one device and one row of 2048
tokens, and that of `configs/llama7b_lora.py`, which trains as many weights, beside it: from shapes
alone, no weights are made. Operations are counted with all rounds of all loops; memory is what the
step holds at its peak besides its arguments. Both compute in float32: a CPU multiplies bfloat16 by
way of float32 copies of the weights, which an accelerator does not make, and which would be
counted. In bfloat16 what is kept takes half. `tests/training/test_remat_table.py` holds the written
table true.

Needs no accelerator, and no network.
"""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compiled_flops import compiled_flops
from moe_jax.adapters import METHODS
from moe_jax.checkpoints.hf_config import model_config_from_hf
from moe_jax.config.run import MeshConfig, RunConfig, parse_run_config
from moe_jax.models.remat import REMAT_POLICIES
from moe_jax.training.program import build_program

LENGTH = 2048
CONFIGS = {"LoRA": "llama7b_lora", "MixLoRA": "llama7b_mixlora"}
POLICIES = ("none", *REMAT_POLICIES)


class StepCost(NamedTuple):
    """Of one compiled step.

    Attributes:
      flops: operations.
      temporary: bytes.
    """

    flops: float
    temporary: int


def step_cost(method: str, policy: str) -> StepCost:
    """Compiles the step of one of `CONFIGS` with one of `POLICIES`."""
    module = importlib.import_module(f"configs.{CONFIGS[method]}")
    config = parse_run_config(module.get_config().to_dict(), METHODS)
    (name, adapter), *_ = config.adapters.items()
    model = model_config_from_hf(config.base.hf_config or {}, "config.base.hf_config")
    config = _one_row(config, name, adapter, policy)
    program = build_program(config, model, total_steps=100, devices=jax.devices()[:1])
    compiled = program.lower_train_step(LENGTH).compile()
    flops, memory = compiled_flops(compiled), compiled.memory_analysis()
    assert not flops.unknown_loops
    assert memory is not None
    return StepCost(flops.total, memory.temp_size_in_bytes)


def _one_row(config: RunConfig, name: str, adapter: Any, policy: str) -> RunConfig:
    compute = dataclasses.replace(
        config.compute,
        dtype="float32",
        attention="xla",
        remat=policy,
        block_tokens=LENGTH,  # as on accelerators
    )
    return dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, param_dtype="float32"),
        compute=compute,
        mesh=MeshConfig(data=1),
        training=dataclasses.replace(config.training, micro_batches=1),
        adapters={name: dataclasses.replace(adapter, batch_size=1)},
    )


COLUMNS = ("TFLOP, LoRA", "TFLOP, MixLoRA", "ratio", "GiB, LoRA", "GiB, MixLoRA", "ratio")


def table_row(policy: str) -> list[float]:
    """The figures of one policy, in the order of `COLUMNS`."""
    lora, mixlora = (step_cost(method, policy) for method in CONFIGS)
    return [
        lora.flops / 1e12,
        mixlora.flops / 1e12,
        mixlora.flops / lora.flops,
        lora.temporary / 2**30,
        mixlora.temporary / 2**30,
        mixlora.temporary / lora.temporary,
    ]


def as_markdown(rows: dict[str, list[float]]) -> str:
    """The table, as it is written to a file."""
    lines = [
        "# Rematerialisation of a 7B step: operations and memory",
        "",
        "`python benchmarks/remat.py --output benchmarks/remat.md` wrote this, and a test holds it",
        f"true. One row of {LENGTH} tokens, one device, float32 (in bfloat16 what is kept takes",
        "half), as XLA compiles it for a CPU.",
        "",
        f"| remat | {' | '.join(COLUMNS)} |",
        f"| --- |{' ---: |' * len(COLUMNS)}",
    ]
    for policy, figures in rows.items():
        lines.append(f"| {policy} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, help="also write the table here")
    args = parser.parse_args()
    text = as_markdown({policy: table_row(policy) for policy in POLICIES})
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
