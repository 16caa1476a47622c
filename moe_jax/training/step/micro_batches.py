"""Joins the batches of several adapters into one, and splits it into micro-batches."""

from collections.abc import Sequence

import numpy as np

from moe_jax.adapters.rows import AdapterRows
from moe_jax.data.batch import Batch


def join_rows(batches: Sequence[Batch]) -> Batch:
    """Stacks batches [B_i, S_i] into one of [sum B_i, max S_i]; shorter rows get padding.

    Args:
      batches: NumPy batches, in the order of the model's `adapter_rows`.
    """
    length = max(batch.tokens.shape[1] for batch in batches)
    padded = [
        [np.pad(array, ((0, 0), (0, length - array.shape[1]))) for array in batch]
        for batch in batches
    ]
    return Batch(*(np.concatenate(arrays) for arrays in zip(*padded, strict=True)))


def split_into_micro_batches(
    batch: Batch, adapter_rows: Sequence[AdapterRows], micro_batches: int
) -> Batch:
    """Splits a batch [B, S] into micro-batches [M, b, S].

    Args:
      batch: NumPy arrays, rows in the order of `adapter_rows`.
      adapter_rows: rows of each adapter, which are spread evenly over micro-batches and shards.
      micro_batches: M.
    """
    ends = np.cumsum([rows.total for rows in adapter_rows])
    shards = adapter_rows[0].shards

    def cut(array: np.ndarray) -> np.ndarray:
        parts = np.split(array, ends[:-1])
        split = [part.reshape(micro_batches, shards, -1, part.shape[-1]) for part in parts]
        return np.concatenate(split, axis=2).reshape(micro_batches, -1, array.shape[-1])

    return Batch(*(cut(np.asarray(array)) for array in batch))


def require_single_sequences(batch: Batch) -> None:
    """Raises `ValueError` if a row is not a single sequence, padded on the right only."""
    segment_ids = np.asarray(batch.segment_ids)
    if segment_ids.max(initial=0) > 1 or (np.diff(segment_ids, axis=-1) > 0).any():
        raise ValueError("each row must be a single sequence, padded on the right only")


def pad_to_multiple(batch: Batch, multiple: int) -> Batch:
    """Adds rows of padding until the number of rows is a multiple; they have no targets."""
    missing = -batch.tokens.shape[0] % multiple
    return Batch(*(np.pad(array, ((0, missing), (0, 0))) for array in batch))
