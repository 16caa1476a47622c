"""Padding has no segment and no target."""

import numpy as np

from moe_jax.data.batch import TokenSequence, pad_rows, padded_length


def test_padded_length_is_the_smallest_that_fits():
    assert [padded_length(n, (4, 8, 10)) for n in (1, 4, 5, 8, 9, 10)] == [4, 4, 8, 8, 10, 10]


def test_rows_are_padded_and_missing_rows_are_empty():
    rows = [
        TokenSequence(
            np.array([7, 8, 9]),
            np.array([False, True, True]),
            expert_group=2,
            reference_log_prob=-2.5,
        ),
        TokenSequence(np.array([5]), np.array([False]), expert_group=1, label=1.5),
    ]
    batch = pad_rows(rows, 3, (4, 8))
    assert batch.tokens.tolist() == [[7, 8, 9, 0], [5, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, False], [False] * 4, [False] * 4]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.expert_groups.tolist() == [[2, 2, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.labels.tolist() == [[0, 0, 0, 0], [1.5, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.reference_log_probs.tolist() == [[0, 0, -2.5, 0], [0] * 4, [0] * 4]
    floats = [np.float32] * 2
    assert [field.dtype for field in batch] == [np.int32, bool, *[np.int32] * 3, *floats]
