"""Peak host memory and time of loading a base model.

    python benchmarks/loading.py --output loading.json
    python benchmarks/loading.py --size 1.1b

Writes a random checkpoint, of about --megabytes or of a named --size, in several shards, then loads
it in new processes on one device and on eight fake CPU devices, in float32 and in bfloat16. The
`RssAnon + RssShmem` of a loading process is sampled in /proc every millisecond. It excludes pages
of files, which the system can drop at any time and which `VmHWM` counts. The baseline is the same
process with all imports and an initialized jax.

Linux only. Exit status 1 if a peak is above --limit times the bytes of the parameters.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEBIBYTE = 2**20
LEAST_MEGABYTES = 8
"""Minimum size of a model with the proportions of `write_checkpoint`."""
SAMPLING_SECONDS = 0.001
# Dtype on disk and on the device, and number of fake CPU devices.
CASES = (("float32", 1), ("bfloat16", 1), ("float32", 8), ("bfloat16", 8))


def write_checkpoint(
    folder: Path, megabytes: int, dtype: str, shards: int, layers: int = 8
) -> None:
    """Writes a random Llama of about `megabytes` MiB in `shards` files, one file at a time."""
    import jax.numpy as jnp

    # Llama's proportions: V about 4 D, F about 2.7 D; then V D 2 + L (4 D D + 3 D F) parameters.
    budget = megabytes * MEBIBYTE / jnp.dtype(dtype).itemsize
    width = int((budget / (8 + layers * (3 + 3 * 2.75))) ** 0.5) // 64 * 64
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 4 * width,
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "head_dim": 64,
    }
    write_model(folder, fields, dtype, shards)


def write_model(folder: Path, fields: dict[str, Any], dtype: str, shards: int) -> None:
    """Writes a random model with these fields of `config.json` in `shards` files."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    from moe_jax.hf.config import model_config_from_hf
    from moe_jax.hf.key_table import base_leaves

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    leaves = base_leaves(model_config_from_hf(fields, "config.json"))
    shapes = {key: leaf.tensor_shape for leaf in leaves for key in leaf.keys}
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    pending: dict[str, np.ndarray] = {}
    written = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(pending, folder / name)
        weight_map.update(dict.fromkeys(pending, name))
        pending.clear()

    for key, shape in shapes.items():
        pending[key] = rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))
        written += pending[key].size
        if written * shards >= total * (len(set(weight_map.values())) + 1):
            flush()
    if pending:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load(folder: Path, dtype: str, devices: int) -> None:
    """Runs the measured process, which waits for a line on stdin before and after loading."""
    import jax
    import jax.numpy as jnp

    from moe_jax.hf.config import read_model_config
    from moe_jax.hf.load import abstract_base_params, load_base_params

    config = read_model_config(folder)
    assert jax.device_count() == devices
    shardings = None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("fsdp",), (jax.sharding.AxisType.Auto,))

        def spread(leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
            """Sharding along the last axis whose size is a multiple of the number of devices."""
            axes: list[str | None] = [None] * len(leaf.shape)
            for axis in range(len(axes) - 1, -1, -1):
                if leaf.shape[axis] % devices == 0:
                    axes[axis] = "fsdp"
                    break
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

        shardings = jax.tree.map(spread, abstract_base_params(config, dtype))
    # Memory of jax's first transfer and computation does not belong to the checkpoint.
    jax.block_until_ready([jnp.ones(8) + 1, *(jax.device_put(1.0, d) for d in jax.devices())])
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    params = load_base_params(folder, config, dtype, shardings)
    seconds = time.perf_counter() - start
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"seconds": seconds, "parameter_bytes": size}), flush=True)
    sys.stdin.readline()


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process in bytes, without pages of files."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def measure(folder: Path, dtype: str, devices: int) -> dict:
    """Loads `folder` in a new process; returns its time and its memory in bytes."""
    command = [sys.executable, __file__, "--load", str(folder), dtype, str(devices)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the loading process failed; see above"
        idle = peak = anonymous_bytes(process.pid)
        os.set_blocking(process.stdout.fileno(), False)
        process.stdin.write("go\n")
        process.stdin.flush()
        samples, report = 0, ""
        while not report and process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            samples += 1
            report = process.stdout.readline()
            time.sleep(SAMPLING_SECONDS)
        if not report:
            if process.wait() != -9:  # killed by Linux, out of memory
                raise RuntimeError(f"loading ended with status {process.returncode}; see above")
            return {"dtype": dtype, "devices": devices, "error": "out of memory"}
        after = anonymous_bytes(process.pid)
        process.stdin.write("done\n")
        process.stdin.flush()
    result = json.loads(report)
    size = result["parameter_bytes"]
    return {
        "dtype": dtype,
        "devices": devices,
        "error": None,
        **result,
        "idle_bytes": idle,
        "peak_above_idle_bytes": peak - idle,
        "after_above_idle_bytes": after - idle,
        "peak_ratio": (peak - idle) / size,
        "samples": samples,
    }


def row_of(case: dict[str, Any]) -> str:
    """Formats one case as a line of the table."""
    start = f"{case['dtype']:15}  {case['devices']:7}"
    if case["error"]:
        return f"{start}  {case['error']}"
    size = case["parameter_bytes"]
    return (
        f"{start}  {size / MEBIBYTE:14.1f}  {case['peak_above_idle_bytes'] / MEBIBYTE:19.1f}"
        f"  {case['peak_ratio']:5.3f}  {case['after_above_idle_bytes'] / size:5.3f}"
        f"  {case['seconds']:7.2f}"
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures all cases and prints each of them."""
    from benchmarks.report import check_output, machine, one_line, write_json
    from benchmarks.sizes import hf_fields, model_of
    from moe_jax.errors import ConfigError

    check_output(args.output)
    if args.size is not None and args.megabytes is not None:
        raise ConfigError("--megabytes: cannot be used with --size; leave one of them out")
    if args.megabytes is None:
        args.megabytes = 1024
    for flag, least in (("megabytes", LEAST_MEGABYTES), ("shards", 1)):
        if getattr(args, flag) < least:
            raise ConfigError(f"--{flag}: must be at least {least}")
    if not args.limit > 0:
        raise ConfigError("--limit: must be positive")
    fields = None if args.size is None else hf_fields(model_of(args.size))
    facts, cases = machine(), []
    print(f"{args.size or f'{args.megabytes} MiB'} in {args.shards} shards; {one_line(facts)}")
    print("disk and device  devices  parameters MiB  peak above idle MiB  ratio  after  seconds")
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in dict.fromkeys(dtype for dtype, _ in CASES):
            folder = Path(scratch) / dtype
            if fields is None:
                write_checkpoint(folder, args.megabytes, dtype, args.shards)
            else:
                write_model(folder, fields, dtype, args.shards)
            for devices in (devices for kind, devices in CASES if kind == dtype):
                cases.append(measure(folder, dtype, devices))
                print(row_of(cases[-1]), flush=True)
            shutil.rmtree(folder)
    write_json(args.output, args, benchmark="loading", machine=facts, cases=cases)
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak host memory of loading a base model.")
    parser.add_argument("--megabytes", type=int, help="size of the checkpoint in MiB (1024)")
    parser.add_argument("--size", help="model of benchmarks/sizes.py, instead of --megabytes")
    parser.add_argument(
        "--shards", type=int, default=5, help="number of files of the checkpoint (5)"
    )
    parser.add_argument(
        "--limit", type=float, default=1.3, help="maximum peak / parameter bytes (1.3)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(Path(args.load[0]), args.load[1], int(args.load[2]))
        return 0

    from benchmarks.report import refuse
    from moe_jax.errors import UserError

    try:
        cases = run(args)
    except UserError as error:
        return refuse(error)
    above_limit = [case for case in cases if not case["error"] and case["peak_ratio"] > args.limit]
    for case in above_limit:
        print(
            f"{case['dtype']} on {case['devices']} devices: the peak is above --limit "
            f"{args.limit}; a small checkpoint is less than the program itself",
            file=sys.stderr,
        )
    return int(any(case["error"] for case in cases) or bool(above_limit))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
