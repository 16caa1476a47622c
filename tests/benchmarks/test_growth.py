"""The written tables of how cost grows with experts and rank are what XLA counts today."""

import json
import re
from pathlib import Path

import pytest
from tolerances import COMPILED_BYTES, COMPILED_COUNTS

from benchmarks import growth, growth_seconds
from benchmarks import growth_counts as counts

TABLE = Path(__file__).parents[2] / "benchmarks" / "growth.md"


def _written(header):
    """The cells of the table under `header`, as numbers."""
    lines = TABLE.read_text().splitlines()
    start = lines.index(header) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[float(cell) for cell in line.strip("|").split("|")] for line in lines[start:end]]


@pytest.fixture(scope="module")
def rows():
    written = _written(growth.GROWTH_HEADER)
    return [growth.Growth(int(e), int(r), *ratios) for e, r, _, *ratios in written]


@pytest.fixture(scope="module")
def per_expert():
    written = _written(growth.PER_EXPERT_HEADER)
    return [growth.PerExpert(int(e), int(r), *ratios) for e, r, *ratios in written]


@pytest.fixture(scope="module")
def grouped():
    written = _written(growth.GROUPED_HEADER)
    return [counts.GroupedCost(int(e), int(r), *ratios) for e, r, _, *ratios in written]


def test_the_text_follows_from_its_tables_and_from_what_was_recorded(rows, per_expert, grouped):
    assert [row[:2] for row in rows] == [(e, r) for e in counts.EXPERTS for r in counts.RANKS]
    assert tuple(row[:2] for row in per_expert) == counts.PER_EXPERT_SETTINGS
    assert tuple(row[:2] for row in grouped) == counts.GROUPED_SETTINGS
    runs = growth_seconds.recorded(TABLE.parent)
    assert growth.as_markdown(rows, per_expert, grouped, runs) == TABLE.read_text()


@pytest.mark.parametrize(("experts", "rank"), [(8, 16), (64, 64)])
def test_the_first_table_is_true_at_its_corners(rows, experts, rank):
    written = next(row for row in rows if row[:2] == (experts, rank))
    computed = counts.growth_of(experts, rank)
    assert computed[:7] == pytest.approx(written[:7], rel=COMPILED_COUNTS)
    assert computed == pytest.approx(written, rel=COMPILED_BYTES)


def test_the_second_table_is_true_at_its_corner(per_expert):
    written = next(row for row in per_expert if row[:2] == (8, 16))
    assert counts.per_expert_of(8, 16) == pytest.approx(written, rel=COMPILED_BYTES)


def test_the_grouped_forms_table_is_true_at_a_corner(grouped):
    written = next(row for row in grouped if row[:2] == (64, 64))
    computed = counts.grouped_of(64, 64)  # whose LoRA the first table has compiled
    assert computed[:5] == pytest.approx(written[:5], rel=COMPILED_COUNTS)
    assert computed == pytest.approx(written, rel=COMPILED_BYTES)


def test_the_grouped_form_needs_little_more_than_its_products(grouped):
    # By half of a block for each expert, and with what the backward pass computes again.
    assert all(1.0 <= row.least < 1.1 for row in grouped)
    for row in grouped:
        shape = counts.shape_of(row.experts, row.rank)
        needed = counts.one_hot_algebra(shape) / counts.grouped_algebra(shape)
        # The low-rank activations that the one-hot form computes again are not among its products.
        assert 0.98 <= row.one_hot / needed <= 1.2, row


def _recorded(tmp_path, ratios):
    """A file of seconds: by experts and rank, grouped over one-hot, as median and highest."""
    rows = []
    for (experts, rank), ratio in ratios.items():
        for form, times, most in (("one-hot", 1.0, 1.0), ("grouped", *ratio)):
            seconds = {"median": 2 * times, "lowest": times, "highest": 3 * times}
            spread = {"median": times, "lowest": times, "highest": most}
            row = {"part": "layer", "experts": experts, "rank": rank, "form": form}
            rows.append({**row, "seconds": seconds, "ratio_to_one_hot": spread})
    rows.append(
        {"part": "activations", "experts": 9, "rank": 9, "form": "one-hot", "seconds": None}
    )
    machine = {"processor": "P", "cores": 2, "load_average": 0.04, "versions": {"jax": "1"}}
    machine["date"] = "2026-01-02T03:04:05"
    settings = {"size": "d512", "rows": 8, "length": 128, "rounds": 5}
    content = {"settings": settings, "machine": machine, "rows": rows}
    (tmp_path / "grouped_d512.json").write_text(json.dumps(content))
    return growth_seconds.recorded(tmp_path)


def test_seconds_in_words(tmp_path):
    # E R of 64, 128, 256 and 512: at 128 not faster in every round, but in all from 256 on.
    ratios = {(8, 8): (0.9, 0.9), (8, 16): (0.9, 1.1), (8, 32): (0.7, 0.8), (32, 16): (0.5, 0.5)}
    (run,) = _recorded(tmp_path, ratios)
    where = "P, 2 cores, load 0.0 before, jax 1, 2026-01-02"
    assert run.run == f"d512: 8 x 128 tokens, 5 rounds, {where}"
    assert growth_seconds.lines([run])[0] == "| d512 | 8 | 8 | 64 | 2 | 0.90 (0.90 to 0.90) |  |  |"
    words = growth_seconds.summary(run)
    assert "faster in 3 of 4 settings, in all from E R of 256 on" in words
    assert words.endswith("in 0.50 of the time with 32 experts of rank 16.")
    (run,) = _recorded(tmp_path, {(8, 8): (0.9, 0.9), (8, 16): (1.1, 1.2)})
    assert "1 of 2 settings, but not at the largest E R" in growth_seconds.summary(run)


def test_counted_operations_equal_the_algebra(rows):
    for row in rows:
        shape = counts.shape_of(row.experts, row.rank)
        assert 0.99 <= row.of_algebra <= 1.02, row
        needed = counts.one_hot_algebra(shape) / counts.grouped_algebra(shape)
        assert row.of_grouped == pytest.approx(needed, rel=COMPILED_COUNTS)


def test_experts_at_which_one_hot_products_cost_a_tenth_more():
    # Multiply-adds a token, D = 4096, F = 11008, R = 16, C = 2, rows of 512:
    #   frozen      2 (4 D D + 3 D F)              404,750,336
    #   attention   scores: a query meets 3 of 4 blocks of 256 on half of 512 keys: 7 * 384 D
    #                                               11,010,048
    #               LoRA: 4 projections, 3 R 2 D     1,572,864
    #   C pairs     9 C R (D + F)                    4,349,952
    # together 421,683,200, and the router 3 D E. Of one-hot products, beyond the grouped:
    #   9 R (E D + E C F) - 9 C R (D + F) = 144 (26112 E - 30208) = 3,760,128 E - 4,349,952
    # A tenth of the grouped is 42,168,320 + 1228.8 E, and so E = 46,518,272 / 3,758,899.2.
    ten = counts.experts_at(0.1, 16, counts.one_hot_algebra)
    assert ten == pytest.approx(46_518_272 / 3_758_899.2)
    # Where products with F are grouped, 9 R D (E - 2) = 589,824 (E - 2) is left of it.
    half = counts.experts_at(0.1, 16, counts.half_grouped_algebra)
    assert half == pytest.approx((42_168_320 + 2 * 589_824) / (589_824 - 1228.8))


def test_thresholds_as_compiled_are_those_of_the_algebra(rows):
    count = 0
    for rank in counts.RANKS:
        of_rank = [row for row in rows if row.rank == rank]
        for share in counts.SHARES:
            compiled = counts.compiled_experts_at(share, of_rank)
            if compiled is not None:
                needed = counts.experts_at(share, rank, counts.one_hot_algebra)
                assert compiled == pytest.approx(needed, rel=0.05)
                count += 1
    assert count >= 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time", "--output", "x.md"], "--output: holds counts only"),
        (["--output", "missing/x.md"], "there is no folder"),
        (["--rounds", "0"], "--rounds: must be positive"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_compiled(flags, message, capsys):
    assert growth.main(flags) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
