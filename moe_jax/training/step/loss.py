"""Cross-entropy of the next tokens that are to be learned, and of the classes of rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax.adapters.rows import Segment, segments_of, take_rows, take_rows_of
from moe_jax.adapters.score_head import Predictions, classifying, last_place
from moe_jax.data.batch import Batch


def row_losses(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy per row, as sums, so that the caller decides over what to average.

    Args:
      logits: float32 [B, S, V]; position s predicts the token at s + 1.
      batch: [B, S]; `loss_mask` marks the tokens that are predicted.

    Returns:
      Sum of the losses in nats, float32 [B], and number of predicted tokens, float32 [B].
    """
    targets = next_tokens(batch)[..., None]
    target_logits = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    return summed_by_row(jax.nn.logsumexp(logits, axis=-1) - target_logits, batch)


def next_tokens(batch: Batch) -> jax.Array:
    """What each position predicts, int32 [B, S]; at the last one something that is not read."""
    return jnp.roll(batch.tokens, -1, axis=-1)


def summed_by_row(token_losses: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """See `row_losses`, of float32 [B, S] losses of `next_tokens`."""
    mask = batch.loss_mask[:, 1:].astype(jnp.float32)
    return jnp.sum(token_losses[:, :-1] * mask, axis=-1), jnp.sum(mask, axis=-1)


def target_count(loss_mask: jax.Array) -> jax.Array:
    """Number of predicted tokens per row, float32 [..., B], of loss_mask [..., B, S]."""
    return jnp.sum(loss_mask[..., 1:], axis=-1, dtype=jnp.float32)


def label_losses(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The loss of each row that is to be classified.

    Args:
      scores: float32 [B, N]; of one score, N = 1, the label is the number that it should be.
      batch: [B, S]; see `Batch.labels`.

    Returns:
      Cross-entropy in nats, or the squared error of a number, float32 [B], 0 for rows without a
      label; and whether a row has one, as 0 or 1, float32 [B].
    """
    is_row = jnp.any(batch.loss_mask, axis=-1).astype(jnp.float32)
    place = last_place(batch.loss_mask)[:, None]
    labels = jnp.take_along_axis(batch.labels, place, axis=-1)[:, 0]
    if scores.shape[-1] == 1:
        losses = jnp.square(scores[:, 0] - labels)
    else:
        classes = labels.astype(jnp.int32)[:, None]
        chosen = jnp.take_along_axis(scores, classes, axis=-1)[:, 0]
        losses = jax.nn.logsumexp(scores, axis=-1) - chosen
    return losses * is_row, is_row


def segment_losses(
    segments: Sequence[Segment], predictions: jax.Array | Predictions, batch: Batch
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """By adapter, loss and number of targets of each of its rows; two float32 [b].

    Args:
      segments: of the batch; at least one.
      predictions: what a model with these segments computed of the batch and its `next_tokens`.
      batch: [B, S].
    """
    if isinstance(predictions, jax.Array):
        predictions = Predictions(None, {}, predictions)
    classifiers = classifying(segments)
    found = {}
    for segment in classifiers:
        own = Batch(*(take_rows(segment, array) for array in batch))
        found[segment.name] = label_losses(predictions.scores[segment.name], own)
    others = [segment for segment in segments if segment not in classifiers]
    if not others:
        return found
    assert predictions.token_losses is not None
    rows = batch
    if classifiers:
        rows = Batch(*(take_rows_of(others, array) for array in batch))
    both = summed_by_row(predictions.token_losses, rows)
    methods = {segment.name: segment.method for segment in others}
    counts = {segment.name: segment.rows for segment in others}
    for segment in segments_of(methods, counts, others[0].shards):  # their places in `rows`
        losses, targets = (take_rows(segment, array) for array in both)
        found[segment.name] = losses, targets
    return found


def target_counts(segment: Segment, loss_mask: jax.Array) -> jax.Array:
    """Number of targets of an adapter's rows, float32 [..., b], of its loss_mask [..., b, S]."""
    if segment.method.classification is None:
        return target_count(loss_mask)
    return jnp.any(loss_mask, axis=-1).astype(jnp.float32)
