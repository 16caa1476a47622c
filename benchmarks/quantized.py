"""Memory, error, loading time and training of a base in eight and four bits.

    python benchmarks/quantized.py --output quantized.json

A random checkpoint of about --megabytes, with the proportions of Llama-2-7B, is loaded as each
storage type: bytes of the parameters, error of the layers' kernels, and seconds. Then the demo's
MixLoRA is trained in float32 on the demo's base in each type, and its losses are compared with
those on the base in bfloat16, its type on disk: sum of the differences divided by the sum of the
losses, and validation loss. Two runs diverge by rounding as their losses approach zero, so a
control is also trained on the base in bfloat16, in two micro-batches.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moe_jax
from benchmarks.loading import LEAST_MEGABYTES, write_checkpoint
from benchmarks.report import (
    MEBIBYTE,
    check_output,
    machine,
    one_line,
    refuse,
    say,
    table,
    write_json,
)
from moe_jax.config.command_line import load_config_file
from moe_jax.demo.corpus import write_corpus
from moe_jax.errors import ConfigError, UserError
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import checked_leaves, load_base_params, read_leaf
from moe_jax.hf.shards import open_shards
from moe_jax.layers.quantized import dense_kernel

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("bfloat16", "int8", "fp8", "nf4", "nf4_double")
CONTROL = "control"
# Embedding and head have 8 D^2 parameters, 3.9% of all with 16 layers of 12.25 D^2, as in 7B.
LAYERS = 16
CONFIG = load_config_file(str(ROOT / "configs" / "tiny_mixlora.py"))
WARMUP = CONFIG["adapters"]["default"]["optimizer"]["schedule"]["warmup_steps"]


def loading_figures(folder: Path, kind: str) -> dict[str, Any]:
    """Loads a base as `kind`; returns its memory, its loading time and its kernels' error."""
    config = read_model_config(folder)
    start = time.perf_counter()
    params = load_base_params(folder, config, kind)
    seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    difference, total = 0.0, 0.0
    with open_shards(folder) as shards:
        for leaf in checked_leaves(shards, config):
            if not leaf.stacked or leaf.path[-1] != "kernel":
                continue
            kernel = params
            for name in leaf.path:
                kernel = kernel[name]
            first = dense_kernel(jax.tree.map(lambda stack: stack[0], kernel)).astype(jnp.float32)
            exact = read_leaf(leaf, shards, np.dtype(np.float32), 0)
            difference += float(np.sum((np.asarray(first) - exact) ** 2, dtype=np.float64))
            total += float(np.sum(exact**2, dtype=np.float64))
    return {"bytes": size, "seconds": seconds, "error": (difference / total) ** 0.5}


def training_figures(kind: str, data: Path, workdir: Path, steps: int) -> dict[str, Any]:
    """Trains the demo's run on its base as `kind`; returns its losses."""
    raw = copy.deepcopy(CONFIG)
    control = kind == CONTROL
    dtype = "bfloat16" if control else kind
    raw["base"] = {"path": str(ROOT / "moe_jax" / "demo" / "base"), "param_dtype": dtype}
    sources = raw["adapters"]["default"]["data"]
    sources["train"]["tasks"]["path"] = str(data / "train.jsonl")
    for task, source in sources["validation"].items():
        source["path"] = str(data / "validation" / f"{task}.jsonl")
    raw["training"] = {"steps": steps, "log_every": max(1, steps // 20)}
    raw["training"]["micro_batches"] = 2 if control else 1
    result = moe_jax.train(raw, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["default/loss"] for line in lines if "default/loss" in line]
    validation = sum(result.validation.values()) / len(result.validation)
    return {"losses": losses, "validation": validation}


def loading_table(figures: dict[str, dict[str, Any]]) -> str:
    """Formats memory and loading time by kind as a table."""
    lines = [
        [
            kind,
            f"{row['bytes'] / MEBIBYTE:.1f}",
            f"{row['bytes'] / figures['bfloat16']['bytes']:.3f}",
            f"{row['error']:.2%}",
            f"{row['seconds']:.1f}",
        ]
        for kind, row in figures.items()
    ]
    return table(("stored as", "MiB", "of bfloat16", "error of kernels", "seconds"), lines)


def training_table(figures: dict[str, dict[str, Any]]) -> str:
    """Formats the differences of each kind's losses from bfloat16's as a table."""
    lines = [
        [
            kind,
            f"{row['losses'][-1]:.4f}",
            f"{row['difference']:.2%}",
            f"{row['validation']:.4f}",
        ]
        for kind, row in figures.items()
    ]
    return table(("trained on", "last loss", "difference of the curve", "validation"), lines)


def difference(losses: list[float], exact: list[float]) -> float:
    """Sum of the differences of two curves, divided by the sum of the second curve."""
    return sum(abs(loss - other) for loss, other in zip(losses, exact, strict=True)) / sum(exact)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="size of the checkpoint in MiB (1024)"
    )
    parser.add_argument(
        "--steps", type=int, default=400, help="number of training steps; 0 for no training (400)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
        if args.megabytes < LEAST_MEGABYTES:
            raise ConfigError(f"--megabytes: must be at least {LEAST_MEGABYTES}")
        if args.steps and args.steps <= WARMUP:
            raise ConfigError(f"--steps: the run warms up for {WARMUP}; give more, or 0 for no run")
        facts = machine()
        print(f"a checkpoint of {args.megabytes} MiB; {one_line(facts)}")
        loads: dict[str, dict[str, Any]] = {}
        trainings: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "base"
            say("writing the checkpoint")
            write_checkpoint(folder, args.megabytes, "bfloat16", shards=5, layers=LAYERS)
            for kind in KINDS:
                say(f"{kind}: loading")
                loads[kind] = loading_figures(folder, kind)
            print(loading_table(loads), flush=True)
            if args.steps:
                data = Path(scratch) / "data"
                write_corpus(data, 0)
                for kind in (*KINDS, CONTROL):
                    say(f"{kind}: training")
                    trainings[kind] = training_figures(kind, data, Path(scratch) / kind, args.steps)
                exact = trainings["bfloat16"]["losses"]
                for row in trainings.values():
                    row["difference"] = difference(row["losses"], exact)
                print(training_table(trainings))
        write_json(
            args.output,
            args,
            benchmark="quantized",
            machine=facts,
            loading=loads,
            training=trainings,
        )
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
