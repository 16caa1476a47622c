"""The table of the cost of rematerialization at 7B equals the counts of XLA."""

import importlib.metadata
from pathlib import Path

import jax
import optax
import pytest
from tolerances import COMPILED_BYTES, COMPILED_COUNTS

from benchmarks import remat
from benchmarks.remat import COLUMNS, POLICIES, StepCost, step_cost
from moe_jax.compiled import target
from moe_jax.layers.vocabulary import logits
from moe_jax.models import causal_lm

TABLE = Path(__file__).parents[2] / "benchmarks" / "remat.md"


def _written():
    rows = {}
    for line in TABLE.read_text().splitlines():
        policy, *figures = [cell.strip() for cell in line.strip("|").split("|")]
        if policy in POLICIES:
            rows[policy] = [float(figure) for figure in figures]
    return rows


@pytest.mark.parametrize(
    ("method", "policy"), [("LoRA", "frozen"), *(("MixLoRA", p) for p in POLICIES)]
)
def test_the_table_is_true(method, policy):
    cost, row = step_cost(method, policy), _written()[policy]
    written = [row[COLUMNS.index(f"{unit}, {method}")] for unit in ("TFLOP", "GiB")]
    assert cost.flops / 1e12 == pytest.approx(written[0], rel=COMPILED_COUNTS)
    assert cost.temporary / 2**30 == pytest.approx(written[1], rel=COMPILED_BYTES)


def test_policies_that_keep_more_compute_less():
    rows = _written()
    assert list(rows) == list(POLICIES)
    for row in rows.values():  # the ratios are those of the figures beside them
        assert row[2] == pytest.approx(row[1] / row[0], abs=1e-3)
        assert row[5] == pytest.approx(row[4] / row[3], abs=1e-3)
    for column in ("TFLOP, MixLoRA", "GiB, MixLoRA"):
        figures = [
            rows[policy][COLUMNS.index(column)] for policy in ("none", "frozen", "narrow", "full")
        ]
        assert figures == sorted(figures, reverse=column.startswith("GiB"))


def test_the_default_costs_little_of_either():
    rows = _written()
    flops, ratio, memory = rows["frozen"][1], rows["frozen"][2], rows["frozen"][5]
    assert flops < 1.03 * rows["none"][1]
    assert ratio < 1.04
    assert memory < 1.15
    # Llama-2-7B and a row of 2048 tokens in bfloat16, in which what is kept takes half.
    assert 2 * 6.74e9 + rows["frozen"][4] / 2 * 2**30 < 24e9


def test_peak_memory_excludes_the_loss(monkeypatch):
    in_chunks = step_cost("MixLoRA", "full")
    calls = []

    def plain(x, kernel, targets, new=None, **settings):
        assert new is None  # no adapter has new tokens
        calls.append(targets.shape)
        scores = logits(x, kernel, **settings)
        return optax.softmax_cross_entropy_with_integer_labels(scores, targets)

    monkeypatch.setattr(causal_lm, "token_losses", plain)
    with_logits = step_cost("MixLoRA", "full")
    assert with_logits.temporary == pytest.approx(in_chunks.temporary, rel=COMPILED_COUNTS)
    assert calls  # the step has gone through the logits


def test_a_missing_tpu_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(target, "compiler_version", lambda platform: None)
    monkeypatch.setattr(remat, "step_cost", None)  # nothing is compiled
    assert remat.main(["--compile-for", "v5p"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: --compile-for v5p: needs libtpu")
    assert printed.err.count("\n") == 1


def test_a_table_for_a_tpu_says_so_and_what_does_not_fit(monkeypatch, tmp_path):
    def cost(method, policy, chip):
        assert chip == "chip of v6e"
        if policy in ("none", "dots"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")
        return StepCost(64e12, (8 if method == "LoRA" else 9) * 2**30, 15 * 2**30)

    monkeypatch.setattr(remat, "target_devices", lambda name: [f"chip of {name}"])
    monkeypatch.setattr(remat, "step_cost", cost)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: f"1.2 of {package}")
    output = tmp_path / "table.md"
    assert remat.main(["--compile-for", "v6e", "--output", str(output)]) == 0
    text = output.read_text()
    assert "remat.py --compile-for v6e`\non " in text
    assert "libtpu 1.2 of libtpu" in text
    assert "one TPU of 32 GiB" in " ".join(text.split())
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    figures = "64.000 | 64.000 | 1.000 | 8.000 | 9.000 | 1.125"
    assert rows == [
        *(f"| {policy} | does not fit |" for policy in ("none", "dots")),
        *(f"| {policy} | {figures} |" for policy in ("frozen", "narrow", "full")),
    ]


def test_a_table_of_some_policies_does_not_claim_to_be_tested(monkeypatch, capsys):
    monkeypatch.setattr(remat, "step_cost", lambda *_: StepCost(64e12, 2**30, 2**30))
    assert remat.main(["--policies", "narrow", "full"]) == 0
    printed = capsys.readouterr().out
    assert "--policies narrow full" in printed
    assert "by a test" not in printed
    assert remat.main([]) == 0
    assert "checked by a test" in capsys.readouterr().out
