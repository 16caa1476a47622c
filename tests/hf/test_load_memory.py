"""Peak host memory of loading a small checkpoint; `benchmarks/loading.py` measures a large one."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 128 * 2**20


def test_peak_stays_near_the_size_of_the_parameters(tmp_path):
    output = tmp_path / "loading.json"
    command = [sys.executable, ROOT / "benchmarks" / "loading.py"]
    arguments = ["--megabytes", "128", "--shards", "4", "--output", output]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(output.read_text())["cases"]
    measured = {(case["dtype"], case["devices"]) for case in cases}
    assert measured == {(dtype, n) for dtype in ("float32", "bfloat16") for n in (1, 8)}
    for case in cases:
        assert 0.8 * PARAMETERS < case["parameter_bytes"] < 1.2 * PARAMETERS
        # The parameters are in this process's memory, so a smaller value would be wrong.
        assert 1.0 <= case["peak_ratio"] <= 1.3, case
        assert case["samples"] > 20
