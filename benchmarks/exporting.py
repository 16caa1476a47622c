"""Peak host memory and time of exporting a MixLoRA adapter as a Mixtral model.

    python benchmarks/exporting.py --output exporting.json

Writes a random Llama of about --megabytes in several shards, then exports a random adapter of 8
experts in a new process. Its memory is sampled as in `benchmarks/loading.py`, without pages of
files. The baseline is the same process with all imports and the adapter in memory. The limit of an
export is 1.5 times the exported bytes of one layer, plus the bytes of the base.

Linux only. Exit status 1 if the peak is above the limit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loading import (
    LEAST_MEGABYTES,
    MEBIBYTE,
    SAMPLING_SECONDS,
    anonymous_bytes,
    write_checkpoint,
)
from benchmarks.report import check_output, machine, one_line, refuse, say, write_json
from moe_jax.errors import ConfigError, UserError

EXPERTS = 8
RANK = 8
FACTOR = 1.5


def export(base: Path, output: Path, dtype: str, dora: bool) -> None:
    """Runs the measured process, which waits for a line on stdin before and after the export."""
    import jax
    import numpy as np

    import moe_jax
    from moe_jax.adapters import METHODS
    from moe_jax.checkpoints.adapter_files import SavedAdapter
    from moe_jax.checkpoints.leaves import nested_dict
    from moe_jax.config.model import FloatType
    from moe_jax.config.parse import parse, parse_member
    from moe_jax.hf.base_model import open_base
    from moe_jax.loaded.adapter_base import expected_leaves

    opened = open_base(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    fields = {"rank": RANK, "alpha": 16.0, "target_modules": targets, "dora": dora}
    method = parse_member(METHODS, {"name": "mixlora", "num_experts": EXPERTS, **fields}, "method")
    rng = np.random.default_rng(0)
    leaves = {
        path: jax.device_put(rng.standard_normal(spec.shape, np.float32))
        for path, spec in expected_leaves(opened.config, method).items()
    }
    adapter = SavedAdapter(method, nested_dict(leaves), opened.config, opened.identity, 0)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    moe_jax.export_adapter(adapter, "mixtral", output, dtype=parse(FloatType, dtype, "dtype"))
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    sys.stdin.readline()


def sizes(output: Path, base: Path) -> dict[str, int]:
    """Bytes of one layer of the export, of the whole export and of the base."""
    from moe_jax.hf.shards import open_shards

    item = {"F32": 4, "F16": 2, "BF16": 2}
    totals = {"layer_bytes": 0, "output_bytes": 0, "base_bytes": 0}
    for folder, whole in ((output, "output_bytes"), (base, "base_bytes")):
        with open_shards(folder) as shards:
            for name, info in shards.tensors.items():
                size = item[info.dtype]
                for length in info.shape:
                    size *= length
                totals[whole] += size
                if folder is output and name.startswith("model.layers.0."):
                    totals["layer_bytes"] += size
    return totals


def measure(base: Path, output: Path, dtype: str, dora: bool) -> dict:
    """Exports in a new process; returns its time and its memory in bytes."""
    command = [sys.executable, __file__, "--export", str(base), str(output), dtype, str(int(dora))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the exporting process failed; see above"
        idle = peak = anonymous_bytes(process.pid)
        os.set_blocking(process.stdout.fileno(), False)
        process.stdin.write("go\n")
        process.stdin.flush()
        report = ""
        while not report and process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            report = process.stdout.readline()
            time.sleep(SAMPLING_SECONDS)
        process.stdin.write("done\n")
        process.stdin.flush()
    totals = sizes(output, base)
    limit = FACTOR * totals["layer_bytes"] + totals["base_bytes"]
    return {
        "dtype": dtype,
        "dora": dora,
        **json.loads(report),
        **totals,
        "peak_above_idle_bytes": peak - idle,
        "limit_bytes": int(limit),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--megabytes", type=int, default=1024, help="size of the base in MiB (1024)"
    )
    parser.add_argument("--shards", type=int, default=5, help="number of files of the base (5)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--export", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.export:
        base, output, dtype, dora = args.export
        export(Path(base), Path(output), dtype, bool(int(dora)))
        return 0
    try:
        results = run(args)
    except UserError as error:
        return refuse(error)
    above_limit = [r["dtype"] for r in results if r["peak_above_idle_bytes"] > r["limit_bytes"]]
    for dtype in above_limit:
        say(f"{dtype}: the peak is above the limit; a small base is less than the program itself")
    return int(bool(above_limit))


def run(args: argparse.Namespace) -> list[dict]:
    """Measures all cases; prints and writes the figures."""
    check_output(args.output)
    for flag, least in (("megabytes", LEAST_MEGABYTES), ("shards", 1)):
        if getattr(args, flag) < least:
            raise ConfigError(f"--{flag}: must be at least {least}")
    facts, results = machine(), []
    print(f"a base of {args.megabytes} MiB; {one_line(facts)}")
    print("tensors   DoRA   base MiB  layer MiB  output MiB  peak above idle MiB  limit  seconds")
    with tempfile.TemporaryDirectory() as scratch:
        for dtype, dora in (("float32", False), ("bfloat16", True)):
            base, output = Path(scratch) / f"base-{dtype}", Path(scratch) / f"out-{dtype}"
            write_checkpoint(base, args.megabytes, dtype, args.shards)
            result = measure(base, output, dtype, dora)
            results.append(result)
            mib = {name: value / MEBIBYTE for name, value in result.items() if "bytes" in name}
            print(
                f"{dtype:8}  {dora!s:5}  {mib['base_bytes']:8.1f}  {mib['layer_bytes']:9.1f}"
                f"  {mib['output_bytes']:10.1f}  {mib['peak_above_idle_bytes']:19.1f}"
                f"  {mib['limit_bytes']:5.0f}  {result['seconds']:7.2f}",
                flush=True,
            )
    write_json(args.output, args, benchmark="exporting", machine=facts, figures=results)
    return results


if __name__ == "__main__":
    sys.exit(main())
