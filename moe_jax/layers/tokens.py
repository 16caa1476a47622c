"""Products of all tokens with a matrix, and sums over the sequences of packed rows."""

from typing import Any

import jax
import jax.numpy as jnp

BRANCH = 1 << 16
"""Segment ids `n + b * BRANCH` are branch b of sequence n, which follows n's own tokens in the row.

Branches are alternative continuations of a sequence: each attends to the sequence and to itself.
"""


def token_product(x: jax.Array, matrix: jax.Array, **options: Any) -> jax.Array:
    """`x @ matrix`, [..., in] and [in, out] to [..., out], with all tokens along one axis.

    The gradient of `matrix` is a product over all tokens. With the two axes [B, S], XLA transposes
    a copy of the wider operand for it; with one axis it does not.

    Args:
      x: tokens.
      matrix: matrix in the dtype of `x`.
      options: options of `jnp.dot`.
    """
    flat = jnp.dot(x.reshape(-1, x.shape[-1]), matrix, **options)
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])


def in_sequence(query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
    """Mask of the keys in a query's sequence, bool in the broadcast shape.

    Args:
      query_ids: segment ids of the queries; 0 is padding, equal numbers are one sequence. A branch
        belongs to its sequence, see `BRANCH`.
      key_ids: segment ids of the keys.
    """
    return (key_ids == query_ids) | (key_ids == query_ids & (BRANCH - 1))


def sequence_bounds(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions in the row of the first and last token of each token's sequence, int32 [B, S].

    Args:
      segment_ids: int [B, S] as in `Batch`; consecutive equal numbers are one sequence, and so are
        consecutive padding tokens.
    """
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    begins, ends = sequence_begins(segment_ids), _ends(segment_ids)
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, index, length - 1), axis=1, reverse=True)
    return first, last


def sequence_sums(values: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum over each sequence, at the position of its last token.

    A segmented scan: differences of cumulative sums over the row would add the rounding errors of
    the sequences before.

    Args:
      values: float [B, S, N].
      segment_ids: as in `sequence_bounds`.

    Returns:
      The sums [B, S, N], and the mask of the positions where they are valid, bool [B, S]: last
      tokens of sequences, but not of padding.
    """

    def joined(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (before, begins), (after, begins_too) = left, right
        return jnp.where(begins_too, after, before + after), begins | begins_too

    begins = sequence_begins(segment_ids)[..., None]
    sums, _ = jax.lax.associative_scan(joined, (values, begins), axis=1)
    return sums, _ends(segment_ids) & (segment_ids != 0)


def sequence_begins(segment_ids: jax.Array) -> jax.Array:
    """True at the first token of each sequence, and of padding, bool [B, S]."""
    differ = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(differ, ((0, 0), (1, 0)), constant_values=True)


def _ends(segment_ids: jax.Array) -> jax.Array:
    differ = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(differ, ((0, 0), (0, 1)), constant_values=True)
