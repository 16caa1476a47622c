"""All measurements on one GPU, the most important first, within a time limit.

    python benchmarks/gpu.py --seconds 480 --output gpu_output
    python benchmarks/gpu.py --tiny --seconds 600 --output gpu_output       # on a CPU, to try it
    python benchmarks/gpu.py --table gpu_output/gpu.jsonl                   # as Markdown

Each part runs in a process of its own and writes each measurement as a line of `gpu.jsonl` at once,
so that a part that fails or runs out of time loses nothing:

    steps     matrix products; the 7B step of MixLoRA, LoRA and the frozen model at 1, 4 and 8 rows
    peft      peft's LoRA in PyTorch with SDPA, with and without checkpointed layers, at these rows
    anchor    Llama-3-8B, 2 rows of 4096 tokens, the setting of published LoRA figures
    variants  MixLoRA's experts in fused kernels against the einsum form: equal results first, then
              the time of each; attention, dropout, XLA's dynamic-slice fusion, its merging of
              small products (`xla_gpu_dot_merger_threshold_mb`), rematerialization; at 7B
    nf4       the 7B step on a base of four bits
    decode    greedy decoding at 7B
    run       `train.py` on a generated checkpoint, and again, killed with -9 and resumed
    tests     the tests of layers, adapters and training steps

Steps of a group are compiled in threads and then timed in turns. Weights are random. The share is
that of the FLOPs that the frozen model needs, equal for peft's step and ours, at the rate of a
matrix product. Planned is the program's memory by XLA; peak is its memory on the device. A device
reports the highest peak of a process only, so that peak is empty where an earlier step of the part
had a higher one. Steps of a group first run in ascending order of planned memory, but groups keep
their order: after steps of four rows, those of one row have no peak, nor have variants of four rows
that need less than an earlier group. A part alone (`--parts`) has the same gaps.
`peft` needs torch and peft, `run` all packages of the project, `tests` those of its tests.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_programs import measure_decoding, measure_run, run_tests
from benchmarks.gpu_results import RESULTS, Recorder, as_table, read_lines
from benchmarks.gpu_training import (
    ANCHOR,
    NF4,
    STEPS,
    measure_peft,
    measure_steps,
    measure_variants,
)


class Part(NamedTuple):
    """One part of the measurements.

    Attributes:
      seconds: most seconds that it takes.
      measure: function that measures and records, run in a process of its own.
    """

    seconds: float
    measure: Callable[[Recorder], None]


PARTS = {
    "steps": Part(180, lambda recorder: measure_steps(recorder, STEPS)),
    "peft": Part(75, measure_peft),
    "anchor": Part(90, lambda recorder: measure_steps(recorder, ANCHOR)),
    "variants": Part(180, measure_variants),
    "nf4": Part(75, lambda recorder: measure_steps(recorder, NF4)),
    "decode": Part(90, measure_decoding),
    "run": Part(120, measure_run),
    "tests": Part(240, run_tests),
}


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.table:
        print(as_table(read_lines(args.table)))
        return 0
    if args.part:
        PARTS[args.part].measure(Recorder(args))
        return 0
    names = args.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"error: --parts {', '.join(unknown)}: known are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    run_parts(args, names)
    print(as_table(read_lines(args.output / RESULTS)))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=Path("gpu_output"),
        metavar="DIR",
        help="folder (%(default)s)",
    )
    add("--seconds", type=float, default=480, help="time limit of all parts (%(default)s)")
    add("--parts", default=",".join(PARTS), help="parts among %(default)s")
    add("--tiny", action="store_true", help="a tiny model, to try the script on a CPU")
    add("--table", type=Path, metavar="FILE", help="print earlier results and end")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser


def run_parts(args: Namespace, names: Sequence[str]) -> None:
    """Runs each part in its own process, none past the end."""
    end = time.monotonic() + args.seconds
    cache = tempfile.gettempdir()
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
        **os.environ,
        # Results of XLA's trials of kernels, which the parts share.
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{cache}/jax"),
    }
    log = (args.output / "gpu.log").open("a")
    for name in names:
        seconds = min(PARTS[name].seconds * (2 if args.tiny else 1), end - time.monotonic())
        recorder = Recorder(Namespace(part=name, output=args.output, seconds=0))
        if seconds < 20:
            recorder.write(error="no time left")
            continue
        print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--part", name, "--seconds", str(seconds - 5)]
        command += ["--output", str(args.output), *(["--tiny"] if args.tiny else [])]
        with subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        ) as process:
            try:
                status = process.wait(seconds)
                if status:
                    recorder.write(error=f"ended with status {status}, see {log.name}")
            except subprocess.TimeoutExpired:
                recorder.write(error=f"stopped after {seconds:.0f} s")
            finally:
                stop_group(process)


def stop_group(process: "subprocess.Popen[Any]") -> None:
    """Kills a process and those it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
