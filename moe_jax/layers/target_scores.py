"""Log-probabilities of targets at some positions, without the logits of all positions.

Of the S positions of a row, a few predict what is scored. Hidden states are gathered there, and
logits computed for a chunk of them at a time, as many chunks as the fullest row of the batch needs.
The number is read at run time, so that one compiled program serves any number of targets.
"""

from collections.abc import Callable

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


def target_scores(
    x: jax.Array,
    kernel: jax.Array,
    places: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    *,
    tied: bool = False,
    cap: float | None = None,
    extend: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target.

    Args:
      x: hidden states [B, S, D].
      kernel: [D, V]; see `logits`.
      places: int [B, N], position of the row that predicts each target.
      targets: int [B, N], the targets of a row from column 0 on.
      counts: int [B], number of targets of each row.
      tied, cap: see `logits`.
      extend: function of hidden states [B, P, D] and their logits [B, P, V] that adds the logits of
        new tokens; None without any.

    Returns:
      Log-probabilities in nats, float32 [B, N], and bool [B, N], true where the target is the most
      likely token. Columns after a row's targets are not defined.
    """
    rows, columns = targets.shape
    width = min(columns, -(-CHUNK_TOKENS // rows))
    # Gathered along D once for all chunks; still split along V.
    axes = (VOCAB, ACTIVATION_EMBED) if tied else (ACTIVATION_EMBED, VOCAB)
    kernel = constrain(kernel.astype(x.dtype), axes)
    surplus = -columns % width
    places, targets = (jnp.pad(array, ((0, 0), (0, surplus))) for array in (places, targets))

    def add(index: jax.Array, scores: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def chunk_of(array: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, index * width, width, axis=1)

        chunk = jnp.take_along_axis(x, chunk_of(places)[..., None], axis=1)
        chunk, wanted = constrain(chunk, HIDDEN_AXES), chunk_of(targets)
        values = constrain(logits(chunk, kernel, tied=tied, cap=cap), (BATCH, LENGTH, VOCAB))
        values = values if extend is None else extend(chunk, values)
        log_probs = jnp.take_along_axis(values, wanted[..., None], axis=-1)[..., 0]
        log_probs = log_probs - jax.nn.logsumexp(values, axis=-1)
        is_likeliest = jnp.argmax(values, axis=-1) == wanted

        def with_chunk(array: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(array, new, index * width, axis=1)

        return with_chunk(scores[0], log_probs), with_chunk(scores[1], is_likeliest)

    none = jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)
    log_probs, is_likeliest = jax.lax.fori_loop(0, -(-jnp.max(counts) // width), add, none)
    return log_probs[:, :columns], is_likeliest[:, :columns]
