"""FLOPs and memory of steps of preference training, relative to SFT of as many tokens.

    python benchmarks/preference_cost.py
    python benchmarks/preference_cost.py --method mixlora

The steps of the model `d512` of `benchmarks.sizes` are compiled without weights, and XLA counts
them, so that the figures have no noise. Temporary memory is that of the step beside its arguments.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.compiled_flops import compiled_flops
from benchmarks.report import table
from benchmarks.sizes import model_of
from moe_jax.adapters import METHODS
from moe_jax.config.recipe import method_fields
from moe_jax.config.run import parse_run_config
from moe_jax.training.step.program import build_program

MODEL = model_of("d512")

STEP = {"reference_log_probs": "step"}
LOSSES: dict[str, dict[str, Any] | None] = {
    "SFT": None,
    "dpo, cached": {"name": "dpo"},
    "dpo, base in the step": {"name": "dpo", **STEP},
    "dpo, start in the step": {"name": "dpo", "reference": "start", **STEP},
    "orpo, simpo": {"name": "orpo"},
    "kto, cached": {"name": "kto"},
    "kto, base in the step": {"name": "kto", **STEP},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts FLOPs and memory of preference steps.")
    parser.add_argument("--method", default="lora", choices=("lora", "mixlora"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    rows, first = [], None
    for title, preference in LOSSES.items():
        compiled = compile_step(arguments, preference)
        memory = compiled.memory_analysis()
        assert memory is not None
        found = (compiled_flops(compiled).total, memory.temp_size_in_bytes)
        first = first or found
        relative = [f"{value / base:.2f}" for value, base in zip(found, first, strict=True)]
        arguments_mib = f"{memory.argument_size_in_bytes / 2**20:.1f}"
        rows.append([title, f"{found[0] / 1e9:.1f}", *relative, arguments_mib])
    headings = ["step", "GFLOP", "relative", "temporary", "arguments (MiB)"]
    print(table(headings, rows))


def compile_step(
    arguments: argparse.Namespace, preference: dict[str, Any] | None
) -> jax.stages.Compiled:
    schema = "text"
    if preference is not None:
        schema = "feedback" if preference["name"] == "kto" else "preference"
    raw = {
        "base": {"path": "unused", "param_dtype": "float32"},
        "compute": {"dtype": "float32"},
        "mesh": {"data": 1},
        "training": {"steps": 1},
        "adapters": {
            "default": {
                "method": method_fields(arguments.method, 8, 4, 2, 0.0),
                "data": {
                    "train": {"unused": {"path": "unused", "schema": schema}},
                    "max_length": arguments.length,
                },
                "optimizer": {"learning_rate": 1e-3},
                "batch_size": arguments.rows,
                "preference": preference,
                "start_from": "unused",
            }
        },
    }
    program = build_program(parse_run_config(raw, METHODS), MODEL, 1, jax.devices()[:1])
    return program.lower_train_step(arguments.length).compile()


if __name__ == "__main__":
    main()
