"""`benchmarks/gpu.py` on a CPU: a failure loses nothing, and no part starts past the end."""

import json
import subprocess
import sys
from argparse import Namespace

import jax
import pytest
from one_device import one_device

from benchmarks import gpu, gpu_programs, gpu_training, training_steps
from benchmarks.gpu_results import RESULTS, Recorder, as_table, read_lines


def test_failed_case_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_training, "TIMED", 2)
    begun, begin = [], gpu_training._begin

    def spied(step, params, row):
        begun.append((step.name, row["planned_gib"]))
        return begin(step, params, row)

    monkeypatch.setattr(gpu_training, "_begin", spied)
    recorder = Recorder(Namespace(part="steps", output=tmp_path, seconds=600, tiny=True))
    group = [("mixlora", {"rows": 2}), ("nonsense", {}), ("lora", {"rows": 2, "dropout": 0.05})]
    with one_device():
        gpu_training.measure_steps(recorder, [group])
    machine, product, *rows = read_lines(tmp_path / RESULTS)
    assert machine["machine"]["devices"][0] == jax.devices()[0].device_kind
    assert product["matrix_product_tflops"] > 0
    failed, *timed = sorted(rows, key=lambda row: "error" not in row)
    assert failed["case"] == ["nonsense", {}]
    assert "no method is called 'nonsense'" in failed["error"]
    assert [row["case"][0] for row in timed] == ["mixlora", "lora"]
    # A peak is seen only where it is the highest so far: the smaller program runs first.
    assert begun == [(row["case"][0], row["planned_gib"]) for row in reversed(timed)]
    assert timed[1]["planned_gib"] < timed[0]["planned_gib"]
    for row in timed:
        assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["seconds"])
        assert 0 < row["needed_share"] < 1
        assert row["planned_gib"] > 0
        assert row["peak_gib"] is None  # a CPU does not know it
    table = as_table([failed, *timed])
    assert "| steps | lora rows 2, dropout 0.05 |" in table
    assert "nonsense" in table


def test_the_peak_is_that_of_one_program():
    before = {"bytes_in_use": 5 * 2**30, "peak_bytes_in_use": 6 * 2**30}
    # Of 9 GiB, 5 were there before, 2 of which are the program's arguments.
    after = {"bytes_in_use": 5 * 2**30, "peak_bytes_in_use": 9 * 2**30}
    assert gpu_training.peak_gib(2 * 2**30, before, after) == 2 + 9 - 5
    assert gpu_training.peak_gib(2 * 2**30, before, before) is None
    assert gpu_training.peak_gib(2 * 2**30, {}, {}) is None


def test_the_frozen_step_is_compiled_with_the_options(monkeypatch):
    options = lambda device: {"no_such_option": 1}
    monkeypatch.setattr(training_steps, "compiler_options", options)
    settings = Namespace(**{**gpu_training.DEFAULTS, **gpu_training.TINY})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        training_steps.compiled_step("frozen", settings).compile()


def test_what_differs_after_a_run_was_resumed(tmp_path):
    for run, total, loss in (("whole", 7, 0.5), ("same", 7, 0.5), ("other", 8, 0.25)):
        folder = tmp_path / run / "adapters/default"
        folder.mkdir(parents=True)
        checksums = {"layers/lora_A": 3, "layers/lora_B": total}
        (folder / "adapter.json").write_text(json.dumps({"checksums": checksums}))
        line = {"step": 10, "default/loss": loss, "time": {"elapsed_seconds": total}}
        (tmp_path / run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert list(gpu_programs.differences(tmp_path / "whole", tmp_path / "same")) == []
    found = list(gpu_programs.differences(tmp_path / "whole", tmp_path / "other"))
    assert found == ["layers/lora_B", "metrics.jsonl"]


def test_the_tests_to_run_exist():
    assert all((gpu_programs.ROOT / path).exists() for path in gpu_programs.TESTS)


def test_the_outcomes_of_tests_that_were_stopped(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', ['one', 'a b'])\n"
        "def test_good(n): pass\n"
        "def test_bad(): assert False\n"
        "def test_never_begun(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-x", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert gpu_programs.outcomes(done.stdout) == {"passed": 2, "failed": ["test_it.py::test_bad"]}


def test_no_part_starts_past_the_end(tmp_path, capsys):
    assert gpu.main(["--parts", "steps,decode", "--seconds", "0", "--output", str(tmp_path)]) == 0
    lines = read_lines(tmp_path / RESULTS)
    assert [(line["part"], line["error"]) for line in lines] == [
        ("steps", "no time left"),
        ("decode", "no time left"),
    ]
    assert gpu.main(["--parts", "step"]) == 2
    assert "error: --parts step: known are steps, peft" in capsys.readouterr().err
