"""Log-probabilities of continuations, without the logits of all positions.

Of the S positions of a row, those that predict its continuation are often a few at its end. Hidden
states are gathered there, and logits computed for a chunk of them at a time, as many chunks as the
longest continuation of the batch needs. The number is read at run time, so that one compiled
program serves continuations of any length.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.layers.vocabulary import logits
from moe_jax.sharding.axes import (
    ACTIVATION_EMBED,
    BATCH,
    HIDDEN_AXES,
    LENGTH,
    VOCAB,
    constrain,
)

CHUNK_TOKENS = 128
"""Positions of a chunk over all rows. Longer chunks compute more positions that no row needs."""


class ContinuationScores(NamedTuple):
    """Scores of the rows of a batch.

    Attributes:
      log_probs: float32 [B], sum of the log-probabilities of a row's targets, in nats.
      is_greedy: bool [B], true where greedy decoding yields the targets.
      candidates: float32 [B, K], log-probability of each candidate for the first target.
    """

    log_probs: jax.Array
    is_greedy: jax.Array
    candidates: jax.Array


def continuation_scores(
    x: jax.Array,
    kernel: jax.Array,
    first: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    candidates: jax.Array,
    *,
    tied: bool = False,
    cap: float | None = None,
    extend: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> ContinuationScores:
    """Scores each row's continuation, and candidates for its first token.

    Args:
      x: hidden states [B, S, D].
      kernel: [D, V]; see `logits`.
      first: int [B], position that predicts the first target.
      targets: int [B, S], the targets of a row from column 0 on.
      counts: int [B], number of targets of each row.
      candidates: int [B, K].
      tied, cap: see `logits`.
      extend: function of hidden states [B, P, D] and their logits [B, P, V] that adds the logits of
        new tokens; None without any.
    """
    rows, length, _ = x.shape
    positions = min(length, -(-CHUNK_TOKENS // rows))
    # Gathered along D once for all chunks; still split along V.
    axes = (VOCAB, ACTIVATION_EMBED) if tied else (ACTIVATION_EMBED, VOCAB)
    kernel = constrain(kernel.astype(x.dtype), axes)

    def add(index: jax.Array, scores: ContinuationScores) -> ContinuationScores:
        columns = index * positions + jnp.arange(positions)[None]  # [1, P]
        is_target = columns < counts[:, None]
        columns = jnp.minimum(columns, length - 1)
        places = jnp.minimum(first[:, None] + columns, length - 1)[..., None]
        chunk = constrain(jnp.take_along_axis(x, places, axis=1), HIDDEN_AXES)
        values = constrain(logits(chunk, kernel, tied=tied, cap=cap), (BATCH, LENGTH, VOCAB))
        values = values if extend is None else extend(chunk, values)
        wanted = jnp.take_along_axis(targets, jnp.broadcast_to(columns, (rows, positions)), axis=1)
        total = jax.nn.logsumexp(values, axis=-1)
        log_probs = jnp.take_along_axis(values, wanted[..., None], axis=-1)[..., 0] - total
        is_likeliest = jnp.argmax(values, axis=-1) == wanted
        at_first = jnp.take_along_axis(values[:, 0], candidates, axis=-1) - total[:, :1]
        return ContinuationScores(
            scores.log_probs + jnp.sum(jnp.where(is_target, log_probs, 0.0), axis=-1),
            scores.is_greedy & jnp.all(is_likeliest | ~is_target, axis=-1),
            jnp.where(index == 0, at_first, scores.candidates),
        )

    none = ContinuationScores(
        jnp.zeros(rows), jnp.ones(rows, bool), jnp.zeros(candidates.shape, jnp.float32)
    )
    chunks = jnp.maximum(1, -(-jnp.max(counts) // positions))
    return jax.lax.fori_loop(0, chunks, add, none)
