"""Batches of several adapters as the rows of one."""

from collections.abc import Sequence

import numpy as np

from moe_jax.data.batch import Batch


def join_rows(batches: Sequence[Batch]) -> Batch:
    """Stacks batches [B_i, S_i] into one of [sum B_i, max S_i]; shorter rows get padding.

    Args:
      batches: NumPy batches, in the order of the model's segments.
    """
    length = max(batch.tokens.shape[1] for batch in batches)
    padded = [
        [np.pad(array, ((0, 0), (0, length - array.shape[1]))) for array in batch]
        for batch in batches
    ]
    return Batch(*(np.concatenate(arrays) for arrays in zip(*padded, strict=True)))


def require_single_sequences(batch: Batch) -> None:
    """Raises `ValueError` where a row is not one sequence, padded on the right only."""
    segment_ids = np.asarray(batch.segment_ids)
    if segment_ids.max(initial=0) > 1 or (np.diff(segment_ids, axis=-1) > 0).any():
        raise ValueError("a row must be one sequence, padded on the right only")


def pad_to_multiple(batch: Batch, multiple: int) -> Batch:
    """Adds rows of padding until their number is a multiple; they have no targets."""
    missing = -batch.tokens.shape[0] % multiple
    return Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in batch))
