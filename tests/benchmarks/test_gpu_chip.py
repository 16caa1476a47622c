"""Compilation for an absent GPU: messages without the plugin, figures of a step."""

import json
import os

import jax
import pytest

from benchmarks import gpu_chip, gpu_step
from benchmarks.sizes import model_of
from benchmarks.training_steps import needed_flops
from moe_jax.errors import ConfigError

TINY = "--size tiny --rows 2 --length 32 --rank 4 --attention xla --methods mixlora,frozen".split()


def test_an_unknown_chip_is_refused():
    with pytest.raises(
        ConfigError, match=r"--compile-for: no chip is called 'h20'; did you mean 'h200'"
    ):
        gpu_chip.gpu_chip("h20")


def test_without_the_plugin_the_message_names_the_package(monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", "--as_they_were")
    monkeypatch.setattr(gpu_chip, "_PLUGINS", ("no-such-plugin",))
    monkeypatch.setattr(gpu_step, "estimate", None)  # nothing is compiled
    assert gpu_step.main(TINY) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: --compile-for: needs jax's CUDA plugin, pip install 'jax[cuda13]'\n"
    )
    assert os.environ["XLA_FLAGS"] == "--as_they_were"


def test_a_plugin_that_cannot_be_used_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("versions differ\nand a trace")

    monkeypatch.setenv("XLA_FLAGS", "--of_the_user")  # put back afterwards
    monkeypatch.setattr(gpu_chip, "plugin_version", lambda: "jax-cuda13-plugin 0")
    monkeypatch.setattr(gpu_chip.topologies, "get_topology_desc", refuse)
    with pytest.raises(ConfigError, match=r"^--compile-for: versions differ$"):
        gpu_chip.gpu_chip("h200")
    # XLA takes the last of several values, so that the user's come last.
    assert os.environ["XLA_FLAGS"].startswith("--xla_gpu_autotune_level=0 ")
    assert os.environ["XLA_FLAGS"].endswith(" --of_the_user")


@pytest.mark.parametrize(
    ("capability", "expected"), [("8.0", True), ("9.0", True), ("10.0", False)]
)
def test_capability_checks_use_the_chip(capability, expected):
    assert gpu_chip._is_at_least(capability) is expected


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
    monkeypatch.setattr(gpu_step, "gpu_chip", lambda name: jax.devices()[0])
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
    needed = needed_flops(model_of("tiny"), rows=2, length=32)
    assert needed < frozen["flops"] < mixlora["flops"]
    for row in (mixlora, frozen):
        assert (tmp_path / f"{row['method']}.hlo").read_text().startswith("HloModule")
        assert row["method"] in printed
        assert row["loops_of_unknown_length"] == 0
        assert row["temporary_bytes"] > 0
        share = needed / 790e12 / row["modelled_seconds"]
        assert row["needed_share"] == pytest.approx(share)
        for name, total in (
            ("kernels", row["kernels"]),
            ("moved", row["moved_bytes"]),
            ("seconds", row["modelled_seconds"]),
        ):
            assert sum(kind[name] for kind in row["kinds"].values()) == pytest.approx(total)
