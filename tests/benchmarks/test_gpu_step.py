"""The estimate of a step on an absent chip: messages, and figures."""

import json

import jax
import pytest

from benchmarks import gpu_step
from benchmarks.sizes import model_of
from benchmarks.training_steps import needed_of_frozen

TINY = "--size tiny --rows 2 --length 32 --rank 4 --attention xla --methods mixlora,frozen".split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rows 0", "--rows: must be positive"),
        ("--top -1", "--top: must not be negative"),
        ("--methods ,", "--methods: names no method"),
        ("--methods mixlroa", "--methods: no method is called 'mixlroa'; did you mean 'mixlora'?"),
        ("--size 7a", "--size: no size is called '7a'"),
        ("--remat half", "--remat: "),
        ("--hlo missing", "--hlo missing: there is no such folder"),
        ("--output missing/x.json", "--output missing/x.json: there is no folder"),
        ("--devices 0", "--devices: must be positive"),
        ("--compile-for h20", "--compile-for: no chip is called 'h20'"),
    ],
)
def test_invalid_flags_are_refused_before_compiling(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(gpu_step, "estimate", None)
    assert gpu_step.main(flags.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")


def test_the_figures_of_a_step(monkeypatch, tmp_path, capsys):
    # The machine of the tests stands in for the GPU: its compiler writes the same language.
    monkeypatch.setattr(gpu_step, "target_devices", lambda name, count: jax.devices()[:count])
    output = tmp_path / "figures.json"
    flags = [*TINY, "--kinds", "--top", "2", "--hlo", str(tmp_path), "--output", str(output)]
    assert gpu_step.main(flags) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("estimate for ")
    assert "nothing was run" in printed
    written = json.loads(output.read_text())
    assert written["is_estimate"] is True
    assert written["machine"]["versions"]["jax"] == jax.__version__
    assert written["rates"]["product"] == 790e12
    mixlora, frozen = written["rows"]
    needed = needed_of_frozen(model_of("tiny"), rows=2, length=32)
    assert needed < frozen["flops"] < mixlora["flops"]
    for row in (mixlora, frozen):
        assert (tmp_path / f"{row['method']}.hlo").read_text().startswith("HloModule")
        assert row["method"] in printed
        assert row["loops_of_unknown_length"] == 0
        assert row["temporary_bytes"] > 0
        assert row["peak_bytes"] >= row["argument_bytes"] + row["temporary_bytes"]
        share = needed / 790e12 / row["modeled_seconds"]
        assert row["needed_share"] == pytest.approx(share)
        for name, total in (
            ("kernels", row["kernels"]),
            ("moved", row["moved_bytes"]),
            ("seconds", row["modeled_seconds"]),
        ):
            assert sum(kind[name] for kind in row["kinds"].values()) == pytest.approx(total)
