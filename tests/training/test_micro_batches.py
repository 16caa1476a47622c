"""Rows of several adapters in one batch."""

import numpy as np

from moe_jax.data.batch import Batch
from moe_jax.training.step.micro_batches import join_rows, pad_to_multiple


def batch(rows, length, fill):
    tokens = np.full((rows, length), fill, np.int32)
    return Batch(
        tokens=tokens,
        loss_mask=np.ones((rows, length), bool),
        segment_ids=np.ones((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        expert_groups=np.full((rows, length), fill, np.int32),
        labels=np.zeros((rows, length), np.float32),
        reference_log_probs=np.zeros((rows, length), np.float32),
    )


def test_rows_are_stacked_and_padded():
    joined = join_rows([batch(2, 3, 7), batch(1, 5, 8)])
    np.testing.assert_array_equal(
        joined.tokens, [[7, 7, 7, 0, 0], [7, 7, 7, 0, 0], [8, 8, 8, 8, 8]]
    )
    np.testing.assert_array_equal(joined.loss_mask.sum(1), [3, 3, 5])
    np.testing.assert_array_equal(joined.segment_ids[:, 3:], [[0, 0], [0, 0], [1, 1]])
    np.testing.assert_array_equal(joined.expert_groups, joined.tokens)
    assert [a.dtype for a in joined] == [np.int32, bool, *[np.int32] * 3, *[np.float32] * 2]


def test_a_single_batch_is_unchanged():
    only = batch(2, 3, 7)
    for array, other in zip(join_rows([only]), only, strict=True):
        np.testing.assert_array_equal(array, other, strict=True)


def test_padding_rows_have_no_target():
    padded = pad_to_multiple(batch(3, 2, 7), 4)
    assert padded.tokens.shape == (4, 2)
    assert not padded.loss_mask[3].any()
    assert not padded.segment_ids[3].any()
    assert pad_to_multiple(batch(4, 2, 7), 4).tokens.shape == (4, 2)
