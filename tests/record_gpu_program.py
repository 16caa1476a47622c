"""Records what a small step compiled for an H200 computes, for `compiled/test_gpu_program.py`.

    python tests/record_gpu_program.py

compiles the step without a GPU and writes `tests/data/gpu_program.json`. Needs jax's CUDA plugin,
`pip install 'jax[cuda13]'`. Run it after a change of the step's program, or of the reader in
`moe_jax/compiled`. Where the plugin is installed, the test compiles too, and compares with the file
if the versions are equal. All weights of this step are small for XLA, so that it does not show
which products `moe_jax/sharding/compiler_options.py` keeps apart.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sizes import model_of
from benchmarks.training_steps import method_named, run_config
from moe_jax.compiled.chips import CHIPS
from moe_jax.compiled.estimate import estimate
from moe_jax.compiled.target import compiler_version, target_devices
from moe_jax.training.step.program import Program, build_program

FILE = Path(__file__).resolve().parent / "data" / "gpu_program.json"
CHIP = "h200"
METHODS = ("lora", "mixlora")
FUSED = "mixlora, fused experts"
FLAGS = argparse.Namespace(
    size="tiny",
    vocab=None,
    rows=2,
    length=512,
    rank=8,
    experts=4,
    top_k=2,
    dtype="bfloat16",
    param_dtype=None,
    remat="none",
    micro_batches=1,
    mesh=None,
)


def step_program(method: str, devices: Any, attention: str = "cudnn", **more: str) -> Program:
    """Program of a step with a method; `more` is further flags."""
    flags = argparse.Namespace(**vars(FLAGS), attention=attention, **more)
    config = run_config(method_named(method, FLAGS), flags)
    return build_program(config, model_of(FLAGS.size), 10, devices)


def summary(method: str, devices: Any, **more: str) -> dict[str, Any]:
    """Figures of a compiled step; see `step_program`."""
    compiled = step_program(method, devices, **more).lower_train_step(FLAGS.length).compile()
    taken = estimate(compiled, CHIPS[CHIP], FLAGS.dtype)
    return {
        "argument_bytes": taken.memory.arguments,
        "temporary_bytes": taken.memory.temporary,
        "peak_bytes": taken.memory.peak,
        "unknown_loops": taken.model.unknown_loops,
        "seconds": taken.model.total.seconds,
        "kinds": {
            kind: {"kernels": sums.kernels, "flops": sums.flops, "moved": sums.moved}
            for kind, sums in taken.model.kinds.items()
        },
    }


def main() -> None:
    """Compiles the steps; prints the figures, and writes them without `--print`."""
    devices = target_devices(CHIP)
    steps = {method: summary(method, devices) for method in METHODS}
    steps[FUSED] = summary("mixlora", devices, expert_kernel="fused")
    recorded = {"compiler": compiler_version("gpu"), "steps": steps}
    text = json.dumps(recorded, indent=2) + "\n"
    if "--print" in sys.argv[1:]:
        print(text)
    else:
        FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
