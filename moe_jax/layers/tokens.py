"""The product of every token with a trained matrix."""

from typing import Any

import jax
import jax.numpy as jnp


def token_product(x: jax.Array, matrix: jax.Array, **options: Any) -> jax.Array:
    """`x @ matrix`, [..., in] and [in, out] to [..., out], with all tokens along one axis.

    The gradient of `matrix` is a product over all tokens. Over the two axes [B, S] XLA would make
    it out of a transposed copy of the wider operand (of [B, S, F] where `out` is F); over one axis
    it transposes nothing.

    Args:
      x: the tokens.
      matrix: cast to the type of `x` by the caller, where they differ.
      options: of `jnp.dot`.
    """
    flat = jnp.dot(x.reshape(-1, x.shape[-1]), matrix, **options)
    return flat.reshape(*x.shape[:-1], matrix.shape[-1])


# FIXME docstring of the merged layers.sequences:
# """Where the sequences of a row begin and end, and sums over each of them.
#
# Letters: B rows, S tokens of a row; a row may hold several sequences, one behind the other.
# """


def sequence_bounds(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The places of the first and of the last token of each token's own sequence, int32 [B, S].

    Args:
      segment_ids: int [B, S] as in `Batch`; neighbours with equal numbers are one sequence, and
        neighbouring tokens of padding count as one too.
    """
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    begins, ends = _begins(segment_ids), _ends(segment_ids)
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, index, length - 1), axis=1, reverse=True)
    return first, last


def sequence_sums(values: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum over each sequence, at the place of its last token.

    Added up in a tree of partial sums that end at a sequence's start: differences of sums over the
    whole row would carry the rounding of all that stands before.

    Args:
      values: float [B, S, N].
      segment_ids: as in `sequence_bounds`.

    Returns:
      The sums, [B, S, N], any value where no sequence ends; and where one does, bool [B, S], which
      is false at padding.
    """

    def joined(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (before, begins), (after, begins_too) = left, right
        return jnp.where(begins_too, after, before + after), begins | begins_too

    begins = _begins(segment_ids)[..., None]
    sums, _ = jax.lax.associative_scan(joined, (values, begins), axis=1)
    return sums, _ends(segment_ids) & (segment_ids != 0)


def _begins(segment_ids: jax.Array) -> jax.Array:
    differ = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(differ, ((0, 0), (1, 0)), constant_values=True)


def _ends(segment_ids: jax.Array) -> jax.Array:
    differ = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(differ, ((0, 0), (0, 1)), constant_values=True)
