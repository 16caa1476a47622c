"""Many mixed requests at once leave nothing behind; `python tests/serving/soak.py` sends more."""

from serving.soak import check, soak


def test_everything_ends_where_it_began(served):
    soak(served, 64, 60, seed=1)  # threads and buffers that are made once
    outcome = soak(served, 240, 60)
    check(served, outcome)
