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
              the time of each; attention, rematerialization, dropout and XLA's dynamic-slice
              fusion; at 7B
    nf4       the 7B step on a base of four bits
    decode    greedy decoding at 7B
    run       `train.py` on a generated checkpoint, and again, killed with -9 and resumed
    tests     the tests of layers, adapters and training steps

Steps of a group are compiled in threads and then timed in turns. Weights are random. The share is
that of the FLOPs that the frozen model needs, equal for peft's step and ours, at the rate of a
matrix product. Planned is the program's memory by XLA; peak is its memory on the device, empty
where an earlier step of the part had a higher one.
`peft` needs torch and peft, `run` all packages of the project, `tests` those of its tests.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = "gpu.jsonl"
TIMED = 8
"""Timed rounds of a group, fewer where time runs out."""

DEFAULTS = {
    "size": "7b",
    "vocab": None,
    "rows": 4,
    "length": 2048,
    "micro_batches": 1,
    "rank": 16,
    "experts": 8,
    "top_k": 2,
    "dtype": "bfloat16",
    "param_dtype": None,
    "attention": "cudnn",
    "remat": "frozen",
    "expert_kernel": "einsum",
    "mesh": None,
    "dropout": 0.0,
}
"""Settings of a step; those of a case differ by what the case names, and by options of XLA."""

TESTS = ("tests/layers", "tests/adapters", "tests/training/test_step.py")
"""Tests of the part `tests`."""

TINY = {"size": "tiny", "length": 64, "attention": "xla", "expert_kernel": "einsum"}
"""Settings that replace those of every case with `--tiny`."""

Case = tuple[str, Mapping[str, Any]]
Group = Sequence[Case]
"""Methods and what differs from `DEFAULTS`, timed in turns."""

METHODS = ("mixlora", "lora", "frozen")
ROWS = (4, 1, 8)
STEPS: tuple[Group, ...] = tuple([(method, {"rows": rows}) for method in METHODS] for rows in ROWS)
ANCHOR: tuple[Group, ...] = (
    [(method, {"size": "8b", "rows": 2, "length": 4096}) for method in METHODS],
)
FUSED = {"expert_kernel": "fused"}
VARIANTS: tuple[Group, ...] = (
    [("mixlora", FUSED), ("mixlora", {}), ("lora", {})],
    [("mixlora", {**FUSED, "rows": 1}), ("mixlora", {"rows": 1}), ("lora", {"rows": 1})],
    [("mixlora", {"attention": "xla", "rows": 1}), ("mixlora", {"rows": 1})],
    [("mixlora", {"dropout": 0.05}), ("lora", {"dropout": 0.05}), ("mixlora", {})],
    [("mixlora", {"xla_gpu_enable_dynamic_slice_fusion": on}) for on in (True, False)],
    [("mixlora", {"xla_gpu_dot_merger_threshold_mb": mb, "rows": 1}) for mb in (4, 32)],
    [("mixlora", {"remat": remat}) for remat in ("frozen", "dots", "full")],
)
NF4: tuple[Group, ...] = ([(method, {"param_dtype": "nf4"}) for method in ("mixlora", "lora")],)


class Part(NamedTuple):
    """One part of the measurements.

    Attributes:
      seconds: most seconds that it takes.
      measure: function that measures and records, run in a process of its own.
    """

    seconds: float
    measure: "Callable[[Recorder], None]"


class Recorder:
    """Writes the measurements of a part, and knows how much time it has left."""

    def __init__(self, args: Namespace):
        self.args = args
        self._file = args.output / RESULTS
        self._end = time.monotonic() + args.seconds

    def left(self) -> float:
        """Seconds until the end of the part."""
        return self._end - time.monotonic()

    def write(self, **fields: Any) -> None:
        """Appends a line to the results."""
        with self._file.open("a") as file:
            file.write(json.dumps({"part": self.args.part, **fields}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempt(self, what: Any, function: Callable[[], Any]) -> Any:
        """The result of `function`; a failure is recorded, and None returned."""
        try:
            return function()
        except Exception as error:  # noqa: BLE001 - other measurements may still succeed
            self.write(case=what, error=f"{type(error).__name__}: {error}"[:600])
            return None


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


# Training steps.


def measure_steps(recorder: Recorder, groups: Sequence[Group]) -> None:
    """Compiles the steps of each group in threads, and times them in turns."""
    import jax

    from benchmarks.random_inputs import params_of
    from benchmarks.report import machine
    from moe_jax.compiled.matrix_rate import MatrixProduct

    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    recorder.write(machine=machine(), memory_limit=limit)
    product = MatrixProduct("bfloat16", [device])
    rate = statistics.median(product.flops / product.seconds() for _ in range(5))
    recorder.write(matrix_product_tflops=rate / 1e12, width=product.width)
    params: dict[tuple[str, str | None], Any] = {}
    for group in groups:
        if recorder.left() < 30:
            recorder.write(error="no time left", case=[method for method, _ in group])
            continue
        running: dict[int, Any] = {}
        with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
            compiled = [
                pool.submit(recorder.attempt, case, functools.partial(_compile, recorder, *case))
                for case in group
            ]
        for index, future in enumerate(compiled):
            if (made := future.result()) is None:
                continue
            step, row, settings = made
            key = (settings.size, settings.param_dtype)
            if key not in params:
                params.clear()  # one base at a time
                params[key] = params_of(step.program)
            begin = functools.partial(_begin, step, params[key], row)
            begun = recorder.attempt(row["case"], begin)
            if begun is not None:
                running[index] = (begun, row, [])
        _time_in_turns(recorder, running, rate)


def measure_variants(recorder: Recorder) -> None:
    """Compares the forms of MixLoRA's experts on one layer, and times steps of all variants."""
    from benchmarks.expert_kernels import measure

    sizes = (70, 130, 1) if recorder.args.tiny else (8192, 11008, TIMED)
    compared = recorder.attempt("expert kernels", lambda: measure(*sizes))
    if compared is not None:
        recorder.write(expert_kernels=compared)
    measure_steps(recorder, VARIANTS)


def _compile(recorder: Recorder, method: str, differs: Mapping[str, Any]) -> Any:
    """A compiled step, its line of results so far, and its settings."""
    from benchmarks.training_steps import compiled_step
    from moe_jax.compiled.estimate import program_memory

    settings = Namespace(**{**DEFAULTS, **differs, **(TINY if recorder.args.tiny else {})})
    step = compiled_step(method, settings)
    options = {name: value for name, value in differs.items() if name.startswith("xla_")}
    memory = program_memory(step.compile({} if recorder.args.tiny else options))
    row = {
        "case": [method, dict(differs)],
        "settings": vars(settings),
        "compile_seconds": round(step.compile_seconds, 1),
        "planned_gib": memory.peak / 2**30,
    }
    return step, row, settings


def _begin(step: Any, params: Any, row: dict[str, Any]) -> Callable[[], float]:
    """Creates the inputs of a compiled step and runs it once; writes its peak memory to `row`."""
    import jax

    from moe_jax.compiled.estimate import program_memory

    device = jax.devices()[0]
    run = step.begin(step, params)
    before = device.memory_stats() or {}
    run()
    arguments = program_memory(step.compiled).arguments
    row["peak_gib"] = peak_gib(arguments, before, device.memory_stats() or {})
    return run


def peak_gib(arguments: int, before: Mapping[str, int], after: Mapping[str, int]) -> float | None:
    """Peak memory of a program on a device, in GiB; None if an earlier peak was higher.

    Args:
      arguments: bytes of the program's arguments, which are on the device before and after.
      before: `Device.memory_stats` before the program ran; empty where the device has none.
      after: the same afterwards.
    """
    peak = "peak_bytes_in_use"
    if after.get(peak, 0) <= before.get(peak, 0):
        return None
    return (arguments + after[peak] - before["bytes_in_use"]) / 2**30


def _time_in_turns(recorder: Recorder, running: dict[int, Any], rate: float) -> None:
    from benchmarks.sizes import model_of
    from benchmarks.timing import seconds_of
    from benchmarks.training_steps import needed_of_frozen

    for turn in range(-1, TIMED):  # the first is not timed, nor was that of `_begin`
        if turn > 2 and recorder.left() < 10:
            break
        for index, (run, row, samples) in list(running.items()):
            seconds = recorder.attempt(row["case"], lambda run=run: seconds_of(run))
            if seconds is None:
                del running[index]
            elif turn >= 0:
                samples.append(seconds)
    for _, row, samples in running.values():
        settings, seconds = row["settings"], statistics.median(samples)
        tokens = settings["rows"] * settings["length"]
        needed = needed_of_frozen(model_of(settings["size"]), settings["rows"], settings["length"])
        recorder.write(
            **row,
            seconds=seconds,
            range=[min(samples), max(samples)],
            tokens_per_second=tokens / seconds,
            needed_tflops=needed / seconds / 1e12,
            needed_share=needed / seconds / rate,
        )


def measure_peft(recorder: Recorder) -> None:
    """Times peft's LoRA of as many weights, on random weights made on the device."""
    import peft
    import torch
    import transformers

    from benchmarks.peft_lora import step_of
    from benchmarks.sizes import hf_fields, model_of
    from benchmarks.timing import seconds_of
    from benchmarks.training_steps import OPTIMIZER, needed_of_frozen

    device = "cuda" if torch.cuda.is_available() else "cpu"
    recorder.write(versions={m.__name__: m.__version__ for m in (torch, peft, transformers)})
    settings = DEFAULTS | (TINY if recorder.args.tiny else {})
    model, length = model_of(settings["size"]), settings["length"]
    config = transformers.LlamaConfig(**hf_fields(model), use_cache=False)
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    ffn = dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), settings["rank"] * settings["experts"]
    )
    lora = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=16,
        rank_pattern=ffn,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *ffn],
    )
    adapted = peft.get_peft_model(base, lora).train()
    for rows in ROWS:
        for checkpointed in (False, True):
            case = ["peft", {"rows": rows, "checkpointed": checkpointed}]
            if recorder.left() < 10:
                recorder.write(case=case, error="no time left")
                continue
            if checkpointed:
                base.gradient_checkpointing_enable()
                base.enable_input_require_grads()
            else:
                base.gradient_checkpointing_disable()
            tokens = torch.randint(0, config.vocab_size, (rows, length), device=device)
            options = {
                "learning_rate": OPTIMIZER["learning_rate"],
                "dtype": "bfloat16",
                "micro_batches": 1,
                "device": device,
                "clip_norm": 1.0,
            }

            def measured(tokens: Any = tokens, options: Any = options) -> list[float]:
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                step = step_of(adapted, tokens, options)
                return [seconds_of(step) for _ in range(2 + TIMED)][2:]

            samples = recorder.attempt(case, measured)
            if device == "cuda":
                torch.cuda.empty_cache()
            if samples is None:
                continue
            seconds = statistics.median(samples)
            recorder.write(
                case=case,
                seconds=seconds,
                range=[min(samples), max(samples)],
                tokens_per_second=rows * length / seconds,
                needed_tflops=needed_of_frozen(model, rows, length) / seconds / 1e12,
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
            )


# Other programs of the project.


def measure_decoding(recorder: Recorder) -> None:
    """Runs `decode.py` without transformers."""
    tiny = recorder.args.tiny
    file = recorder.args.output / "decode.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks/decode.py"), "--alone", "--output", str(file)]
    command += ["--size", "tiny" if tiny else "7b", "--dtype", "float32" if tiny else "bfloat16"]
    command += ["--batches", "1,8", "--repeats", "3", "--prompt", "64", "--new-tokens", "65"]
    subprocess.run(command, check=True)
    recorder.write(decode=json.loads(file.read_text())["figures"])


def measure_run(recorder: Recorder) -> None:
    """Trains with `train.py` twice, once killed and resumed, and compares weights and losses."""
    from benchmarks.generated_run import write_base, write_rows

    size = "tiny" if recorder.args.tiny else "160m"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_base(folder / "base", size)
        write_rows(folder / "rows.jsonl", 400)
        start = time.monotonic()
        _finish(_train(folder, "whole"))
        seconds = time.monotonic() - start
        killed = _train(folder, "killed")
        metrics = folder / "killed" / "metrics.jsonl"
        while killed.poll() is None and not (
            metrics.exists() and '"step": 20' in metrics.read_text()
        ):
            time.sleep(0.05)
        was_killed = killed.poll() is None
        killed.kill()
        killed.wait()
        _finish(_train(folder, "killed"))
        differ = list(differences(folder / "whole", folder / "killed"))
        recorder.write(
            run_seconds=seconds,
            size=size,
            was_killed=was_killed,
            differ_after_kill_and_resume=differ,
        )


def _train(folder: Path, workdir: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(ROOT / "train.py"), "--base", str(folder / "base")]
    command += ["--data", str(folder / "rows.jsonl"), "--workdir", str(folder / workdir)]
    command += ["--set", "training.steps=40", "--set", "checkpoints.every=10"]
    command += ["--set", "training.log_every=10"]
    return subprocess.Popen(command, cwd=folder)


def _finish(process: "subprocess.Popen[bytes]") -> None:
    """Waits for a run, which must succeed."""
    if process.wait():
        raise RuntimeError(f"train.py ended with status {process.returncode}")


def differences(one: Path, other: Path) -> Iterator[str]:
    """Adapter leaves whose bits differ between two runs, and `metrics.jsonl` if losses do.

    Names of weight files are random, so that the checksums of leaves are compared.
    """
    description = Path("adapters/default/adapter.json")
    sums, others = (
        json.loads((run / description).read_text())["checksums"] for run in (one, other)
    )
    yield from (leaf for leaf in sorted({*sums, *others}) if sums.get(leaf) != others.get(leaf))
    losses = [
        [{k: v for k, v in json.loads(line).items() if "loss" in k} for line in lines.splitlines()]
        for lines in ((run / "metrics.jsonl").read_text() for run in (one, other))
    ]
    if losses[0] != losses[1]:
        yield "metrics.jsonl"


def run_tests(recorder: Recorder) -> None:
    """Runs the tests that compute on the device, as many as the time allows."""
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if not recorder.args.tiny:
        environment["MOE_JAX_TEST_PLATFORMS"] = "cuda,cpu"
        # Some tests start processes, which need memory of their own.
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        # Otherwise the tests compile kernels that are slow.
        flags = os.environ.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=3"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", *TESTS]
    file = recorder.args.output / "tests.txt"
    with (
        file.open("w") as stream,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
        ) as process,
    ):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1.0, recorder.left() - 5))
        ended = process.poll()
        process.kill()
    recorder.write(**outcomes(file.read_text()), pytest_status=ended, file=str(file))


def outcomes(text: str) -> dict[str, Any]:
    """Number of tests that passed, and the names of those that failed, from `pytest -v`."""
    found = re.findall(r"^(\S+::.+) (PASSED|FAILED|ERROR)(?: +\[ *\d+%\])?$", text, re.MULTILINE)
    failed = list(dict.fromkeys(name for name, outcome in found if outcome != "PASSED"))
    return {"passed": sum(outcome == "PASSED" for _, outcome in found), "failed": failed}


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


# Results.


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The measurements of a results file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def as_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Formats the steps as a Markdown table, with what else was measured below it."""
    rows = [
        "| part | step | s | tokens/s | needed TFLOP/s | share | planned GiB | peak GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    others = []
    for line in lines:
        if "seconds" in line:
            method, differs = line["case"]
            named = ", ".join(f"{name} {value}" for name, value in differs.items())
            cells = [
                line["part"],
                f"{method} {named}".strip(),
                f"{line['seconds']:.4g}",
                f"{line['tokens_per_second']:,.0f}",
                f"{line['needed_tflops']:.4g}",
                f"{line['needed_share']:.1%}" if "needed_share" in line else "",
                f"{line['planned_gib']:.1f}" if "planned_gib" in line else "",
                f"{line['peak_gib']:.1f}" if line.get("peak_gib") else "",
            ]
            rows.append(f"| {' | '.join(cells)} |")
        else:
            others.append(f"{line['part']}: " + json.dumps({**line, "part": None}, default=str))
    return "\n".join([*rows, "", *others])


if __name__ == "__main__":
    sys.exit(main())
