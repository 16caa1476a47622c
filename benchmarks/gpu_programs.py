"""Programs of the project that `benchmarks/gpu.py` runs: decoding, a training run, and tests."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_results import Recorder

ROOT = Path(__file__).resolve().parents[1]

TESTS = ("tests/layers", "tests/adapters", "tests/training/test_step.py")
"""Tests of the part `tests`."""


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
