"""Flags of the packing benchmark: valid and invalid values, without measuring."""

import pytest

from benchmarks import packing


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--buckets=128,1024"], "--buckets: 1024 is not between 1 and 1023; leave it out"),
        (["--length=64", "--buckets=64"], "leave it out, or give a larger --length"),
        (["--buckets=0,16"], "--buckets: 0 is not between 1 and"),
        (["--buckets=128;256"], "--buckets: expected whole numbers, separated by commas"),
        (["--rows=0"], "--rows: must be positive"),
        (["--data=nowhere.json"], "--data nowhere.json: there is no such file"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, words):
    assert packing.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "buckets"),
    [
        ([], [128, 256, 512]),
        (["--length=256"], [128]),
        (["--length=256", "--buckets=32, 255"], [32, 255]),
        (["--buckets=512,128,128"], [128, 512]),
        (["--buckets="], []),
    ],
)
def test_lengths_of_bucketed_rows(flags, buckets):
    args = packing.parser().parse_args(flags)
    packing.check(args)
    assert args.buckets == buckets
