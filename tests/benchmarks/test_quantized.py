"""The benchmark of quantized bases: what it reports of a small checkpoint, and what it refuses."""

import json

import pytest

from benchmarks import quantized


def test_time_and_size_of_checkpoints(tmp_path, capsys):
    output = tmp_path / "figures.json"
    assert quantized.main(["--megabytes=8", "--steps=0", f"--output={output}"]) == 0
    written = json.loads(output.read_text())
    loads = written["loading"]
    # Beside the bytes of kernels, 2 to a number: a scale of 4 for each column of some hundred
    # rows, or for each 64 numbers of half a byte; and embeddings that stay as they are.
    shares = {
        kind: figures["bytes"] / loads["bfloat16"]["bytes"] for kind, figures in loads.items()
    }
    assert 0.5 < shares["int8"] == shares["fp8"] < 0.56
    assert 0.27 < shares["nf4"] < 0.32
    errors = {kind: figures["error"] for kind, figures in loads.items()}
    assert 0 == errors["bfloat16"] < errors["int8"] < errors["fp8"] < errors["nf4"] < 0.1
    assert written["training"] == {}
    assert f"{shares['nf4']:.3f}" in capsys.readouterr().out


def test_the_difference_of_two_curves_by_hand():
    assert quantized.difference([2.0, 1.5, 1.0], [2.5, 1.5, 0.0]) == pytest.approx(1.5 / 4.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--megabytes=1"], "--megabytes: must be at least 8"),
        (["--steps=3"], "--steps: the run warms up for 20; give more, or 0"),
        (["--output=nowhere/figures.json"], "--output nowhere/figures.json: there is no folder"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, words):
    assert quantized.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1
