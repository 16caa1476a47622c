"""The written tables of how cost grows with experts and rank are what XLA counts today."""

import re
from pathlib import Path

import pytest
from tolerances import COMPILED_BYTES, COMPILED_COUNTS

from benchmarks import growth
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


def test_the_text_follows_from_its_tables(rows, per_expert):
    assert [row[:2] for row in rows] == [(e, r) for e in counts.EXPERTS for r in counts.RANKS]
    assert tuple(row[:2] for row in per_expert) == counts.PER_EXPERT
    assert growth.as_markdown(rows, per_expert) == TABLE.read_text()


@pytest.mark.parametrize(("experts", "rank"), [(8, 16), (64, 64)])
def test_the_first_table_is_true_at_its_corners(rows, experts, rank):
    written = next(row for row in rows if row[:2] == (experts, rank))
    # Another release of XLA may fuse, and so count, a few elementwise operations differently.
    assert counts.growth_of(experts, rank) == pytest.approx(written, rel=COMPILED_COUNTS)


def test_the_second_table_is_true_at_its_corner(per_expert):
    written = next(row for row in per_expert if row[:2] == (8, 16))
    assert counts.per_expert_of(8, 16) == pytest.approx(written, rel=COMPILED_BYTES)


def test_what_is_counted_is_what_the_products_need(rows):
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
    found = 0
    for rank in counts.RANKS:
        of_rank = [row for row in rows if row.rank == rank]
        for share in counts.SHARES:
            compiled = counts.compiled_experts_at(share, of_rank)
            if compiled is not None:
                needed = counts.experts_at(share, rank, counts.one_hot_algebra)
                assert compiled == pytest.approx(needed, rel=0.05)
                found += 1
    assert found >= 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time", "--output", "x.md"], "--output: has what is counted"),
        (["--output", "missing/x.md"], "there is no folder"),
        (["--rounds", "0"], "--rounds: must be positive"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_compiled(flags, message, capsys):
    assert growth.main(flags) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
