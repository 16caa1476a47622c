"""A base in eight and four bits against bfloat16: bytes, errors, loading, and a training run.

    python benchmarks/quantized.py --output quantized.json

First a random checkpoint of about --megabytes, with embeddings as large beside its layers as those
of Llama-2-7B, is loaded as each type: bytes of the parameters, the error of the layers' kernels,
and the seconds it takes. Then the demo's MixLoRA is trained on the demo's base in each type, in
float32 arithmetic, and the losses are compared with those on the base in bfloat16, which is how it
is stored: the sum of all differences over the sum of all losses, and the validation loss. Two runs
drift apart by rounding alone as their losses near zero, so a control is trained as well: on the
base in bfloat16, in two micro-batches.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("bfloat16", "int8", "fp8", "nf4", "nf4_double")
CONTROL = "control"
# 8 D^2 of embedding and head beside 16 x 12.25 D^2 are 3.9%, as in Llama-2-7B.
LAYERS = 16


def loaded(folder: Path, kind: str) -> dict[str, Any]:
    """What a base costs as `kind`, and how far its kernels are from those on disk."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moe_jax.checkpoints.base import checked_leaves, load_base, read_leaf
    from moe_jax.checkpoints.hf_config import read_model_config
    from moe_jax.checkpoints.shards import open_shards
    from moe_jax.layers.quantized import dense_kernel

    config = read_model_config(folder)
    start = time.perf_counter()
    params = load_base(folder, config, kind)
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


def trained(kind: str, data: Path, workdir: Path, steps: int) -> dict[str, Any]:
    """The losses of the demo's run on its base as `kind`."""
    import moe_jax
    from moe_jax.config.command_line import load_config_file

    raw = load_config_file(str(ROOT / "configs" / "tiny_mixlora.py"))
    control = kind == CONTROL
    dtype = "bfloat16" if control else kind
    raw["base"] = {"path": str(ROOT / "moe_jax" / "demo" / "base"), "param_dtype": dtype}
    own = raw["adapters"]["default"]["data"]
    own["train"]["tasks"]["path"] = str(data / "train.jsonl")
    for task, source in own["validation"].items():
        source["path"] = str(data / "validation" / f"{task}.jsonl")
    raw["training"] = {"steps": steps, "log_every": max(1, steps // 20)}
    raw["training"]["micro_batches"] = 2 if control else 1
    result = moe_jax.train(raw, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["default/loss"] for line in lines if "default/loss" in line]
    validation = sum(result.validation.values()) / len(result.validation)
    return {"losses": losses, "validation": validation}


def main() -> int:
    parser = argparse.ArgumentParser(description="A quantised base against bfloat16.")
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the checkpoint")
    parser.add_argument("--steps", type=int, default=400, help="of the training run; 0 leaves it")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    from loading import write_checkpoint

    from moe_jax.demo.corpus import write_corpus

    results: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        write_checkpoint(folder, args.megabytes, "bfloat16", shards=5, layers=LAYERS)
        print("kept as     MiB      of bfloat16  error of kernels  seconds")
        for kind, result in results.items():
            result |= loaded(folder, kind)
            share = result["bytes"] / results["bfloat16"]["bytes"]
            print(
                f"{kind:10}  {result['bytes'] / 2**20:7.1f}  {share:11.3f}"
                f"  {result['error']:16.2%}  {result['seconds']:7.1f}",
                flush=True,
            )
        if args.steps:
            data = Path(scratch) / "data"
            write_corpus(data, 0)
            results[CONTROL] = {}
            for kind, result in results.items():
                result |= trained(kind, data, Path(scratch) / kind, args.steps)
            exact = results["bfloat16"]
            print("\nkept as     last loss  difference of the curve  validation")
            for kind, result in results.items():
                pairs = zip(result["losses"], exact["losses"], strict=True)
                distance = sum(abs(ours - theirs) for ours, theirs in pairs)
                result["difference"] = distance / sum(exact["losses"])
                print(
                    f"{kind:10}  {result['losses'][-1]:9.4f}  {result['difference']:23.2%}"
                    f"  {result['validation']:10.4f}"
                )
    if args.output:
        args.output.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
