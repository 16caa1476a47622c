"""`benchmarks/gpu.py` on a CPU: a failure loses nothing, and no part starts past the end."""

from argparse import Namespace

import jax
import pytest
from one_device import one_device

from benchmarks import gpu


def test_failed_case_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TIMED", 2)
    recorder = gpu.Recorder(Namespace(part="steps", output=tmp_path, seconds=600, tiny=True))
    group = [("mixlora", {"rows": 2}), ("nonsense", {}), ("lora", {"rows": 2, "dropout": 0.05})]
    with one_device():
        gpu.measure_steps(recorder, [group])
    machine, product, *rows = gpu.read_lines(tmp_path / gpu.RESULTS)
    assert machine["machine"]["devices"][0] == jax.devices()[0].device_kind
    assert product["matrix_product_tflops"] > 0
    failed, *timed = sorted(rows, key=lambda row: "error" not in row)
    assert failed["case"] == ["nonsense", {}]
    assert "no method is called 'nonsense'" in failed["error"]
    assert [row["case"][0] for row in timed] == ["mixlora", "lora"]
    for row in timed:
        assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["seconds"])
        assert 0 < row["needed_share"] < 1
    table = gpu.as_table([failed, *timed])
    assert "| steps | lora rows 2, dropout 0.05 |" in table
    assert "nonsense" in table


def test_no_part_starts_past_the_end(tmp_path, capsys):
    assert gpu.main(["--parts", "steps,decode", "--seconds", "0", "--output", str(tmp_path)]) == 0
    lines = gpu.read_lines(tmp_path / gpu.RESULTS)
    assert [(line["part"], line["error"]) for line in lines] == [
        ("steps", "no time left"),
        ("decode", "no time left"),
    ]
    assert gpu.main(["--parts", "step"]) == 2
    assert "error: --parts step: known are steps, peft" in capsys.readouterr().err
