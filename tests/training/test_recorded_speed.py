"""Tokens and FLOPs per second of a run, from its batches."""

import types

import pytest
from tiny_program import LORA, program, random_batch

from moe_jax.compiled.matrix_rate import MatrixRate
from moe_jax.training.records import recorder
from moe_jax.training.records.console import ProgressBar
from moe_jax.training.records.metric_log import Window
from moe_jax.training.step.needed_flops import needed_flops


def test_a_line_and_the_bar_say_how_well_the_devices_are_used(monkeypatch):
    now, lines, said, shown = [0.0], [], [], []
    monkeypatch.setattr(recorder.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ProgressBar, "update", lambda _, step, values: shown.append(values))
    made = program({"a": LORA}, training={"log_every": 8}, total_steps=9)
    batch = random_batch(8)
    tokens = int((batch.segment_ids > 0).sum())
    needed = needed_flops(made.model.config, made.config.methods, made.abstract_state.adapters)
    flops = needed.of_batch(batch, {"a": 8})
    rate = MatrixRate(10 * flops, "a product")  # a step needs a tenth of a second at least
    writer = types.SimpleNamespace(write=lambda step, line: lines.append(line))
    recorded = recorder.Recorder(
        made, {"a": 9}, [writer], Window(), said.append, ProgressBar(9, 0, show=False), rate=rate
    )
    assert recorded.speed() is None
    values = {"loss": 1.0, "grad_norm": 1.0, "skipped_in_a_row": 0, "skipped_total": 0}
    metrics = {f"a/{name}": value for name, value in values.items()}
    for step in range(1, 9):
        recorded.push(step, {**metrics, "padding_share": 0.25}, batch)
        now[0] += 0.5
    recorded.drain()
    time = lines[0]["time"]
    assert time["seconds_per_step"] == 0.5
    assert time["tokens_per_second"] == pytest.approx(2 * tokens, abs=0.1)
    assert time["model_tflops_per_second"] == pytest.approx(2 * flops / 1e12, rel=1e-4)
    assert time["mfu"] == 0.2
    assert said[0].endswith(
        f"{2 * tokens:,} tokens/s  {2 * flops / 1e12:.3g} TFLOP/s  MFU 20%  left 0:00:00"
    )
    # Step 9 is compiled first, so that its time says nothing.
    recorded.push(9, {**metrics, "padding_share": 0.25}, None)
    recorded.drain()
    assert shown[-1]["MFU"] == "20%"
    assert shown[-1]["tokens/s"] == f"{2 * tokens:,}"
    mean = recorded.speed()
    assert mean is not None
    assert mean.endswith(f"MFU 20% of {rate.describe()}")
