"""The benchmark of the grouped form counts what its products need, and refuses wrong flags."""

import json
import re

import pytest
from tolerances import COMPILED_COUNTS

from benchmarks import grouped
from benchmarks.grouped_rows import block_count, rows_of_block


def test_counted_operations_are_those_of_the_products(tmp_path):
    flags = "--size tiny --parts expansion --forms one-hot,grouped,ragged --experts 64 --ranks 16"
    output = tmp_path / "figures.json"
    shape = ["--rows", "4", "--length", "64", "--time", "--rounds", "1", "--output", str(output)]
    assert grouped.main([*flags.split(), *shape]) == 0
    one_hot, blocked, ragged = json.loads(output.read_text())["rows"]
    # T = 256 tokens of C = 2 slots, F = 176, R = 16: three products of 2 T C (E R) F with all of
    # E = 64 experts' pairs, and of N n rows with one expert's.
    assert one_hot["flops"] == pytest.approx(3 * 2 * 512 * 64 * 16 * 176, rel=COMPILED_COUNTS)
    block = rows_of_block(512, 64)
    places = block_count(512, 64, block) * block
    # The rest, of blocks as few as 8 rows, adds the gradients of an expert's blocks up.
    needed = 3 * 2 * places * 16 * 176
    assert needed <= blocked["flops"] <= 1.15 * needed
    assert blocked["flops"] < one_hot["flops"] / 25
    # What growth.md says of it on a CPU.
    assert ragged["flops"] > one_hot["flops"]
    assert ragged["temporary_bytes"] > 5 * one_hot["temporary_bytes"]
    for row in (one_hot, blocked, ragged):
        assert row["temporary_bytes"] > 0
        assert row["seconds"]["median"] > 0
    ratio = blocked["seconds"]["median"] / one_hot["seconds"]["median"]  # of the one round
    assert blocked["ratio_to_one_hot"]["median"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--size 6b", "--size: no size is called '6b'"),
        ("--parts activations,ffn", "--parts: 'ffn' is none of activations, expansion, layer"),
        (
            "--parts activations --forms lora",
            "--forms lora: none of them is a form of --parts activations",
        ),
        ("--forms sorted", "--forms: 'sorted' is none of one-hot, grouped"),
        ("--experts 8,x", "--experts 8,x: must be numbers"),
        ("--experts 8,1", "--experts 8,1: must be at least 2"),
        ("--experts 2 --top-k 4", "at least --top-k"),
        ("--ranks 0", "--ranks 0: must be positive"),
        ("--rounds 0", "--rounds: must be positive"),
        ("--output missing/x.json", "there is no folder"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_compiled(flags, message, capsys):
    assert grouped.main(flags.split()) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
