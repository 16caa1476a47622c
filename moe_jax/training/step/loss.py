"""Losses of a batch: next-token cross-entropy, and losses of classification and regression."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.adapters.rows import AdapterRows, divide_rows, take_rows, take_rows_of_adapters
from moe_jax.adapters.score_head import is_classifier, last_position
from moe_jax.data.batch import Batch
from moe_jax.models.causal_lm import LlamaForCausalLM


class HeadOutputs(NamedTuple):
    """Outputs of all heads on one batch.

    Attributes:
      token_losses: cross-entropy of the next token at each position, float32 [b, S], of the rows
        that belong to no classification adapter; None if all do.
      scores: scores of the rows of each classification adapter, float32 [b, N].
    """

    token_losses: jax.Array | None
    scores: dict[str, jax.Array]


def head_outputs(model: LlamaForCausalLM, hidden: jax.Array, batch: Batch) -> HeadOutputs:
    """Applies every head to its rows.

    Args:
      model: the bound model.
      hidden: hidden states of the batch, [B, S, D].
      batch: [B, S].
    """
    rows, losses = model.language_model_rows(hidden), None
    if rows is not None:
        targets = model.language_model_rows(next_tokens(batch))
        assert targets is not None
        losses = model.token_losses(rows, targets)
    return HeadOutputs(losses, model.scores(hidden, batch.segment_ids != 0))


def row_losses(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy of each row; the caller chooses how to average.

    Args:
      logits: float32 [B, S, V]; position s predicts the token at s + 1.
      batch: [B, S]; `loss_mask` marks the predicted tokens.

    Returns:
      Sum of the losses in nats, float32 [B], and number of predicted tokens, float32 [B].
    """
    targets = next_tokens(batch)[..., None]
    target_logits = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    return sum_by_row(jax.nn.logsumexp(logits, axis=-1) - target_logits, batch)


def next_tokens(batch: Batch) -> jax.Array:
    """Target of each position, int32 [B, S]; the last one is never read."""
    return jnp.roll(batch.tokens, -1, axis=-1)


def sum_by_row(token_losses: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums token losses, float32 [B, S], over each row; returns the same as `row_losses`."""
    mask = batch.loss_mask[:, 1:].astype(jnp.float32)
    return jnp.sum(token_losses[:, :-1] * mask, axis=-1), jnp.sum(mask, axis=-1)


def first_targets(loss_mask: jax.Array) -> jax.Array:
    """Mask of the first target token of each answer in a loss mask; bool [..., S].

    Where answers are labels, it marks the label, without the end-of-text token after it.
    """
    before = jnp.roll(loss_mask, 1, axis=-1).at[..., 0].set(False)
    return loss_mask & ~before


def label_losses(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Classification or regression loss of each row.

    Args:
      scores: float32 [B, N]; N = 1 is a regression.
      batch: [B, S]; see `Batch.labels`.

    Returns:
      Cross-entropy in nats, or the squared error of a regression, float32 [B], 0 for rows without a
      label; and 1 for rows with a label, 0 for others, float32 [B].
    """
    is_row = jnp.any(batch.loss_mask, axis=-1).astype(jnp.float32)
    position = last_position(batch.loss_mask)[:, None]
    labels = jnp.take_along_axis(batch.labels, position, axis=-1)[:, 0]
    if scores.shape[-1] == 1:
        losses = jnp.square(scores[:, 0] - labels)
    else:
        classes = labels.astype(jnp.int32)[:, None]
        label_scores = jnp.take_along_axis(scores, classes, axis=-1)[:, 0]
        losses = jax.nn.logsumexp(scores, axis=-1) - label_scores
    return losses * is_row, is_row


def adapter_losses(
    adapter_rows: Sequence[AdapterRows], outputs: HeadOutputs, batch: Batch
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Loss and number of targets of each row of each adapter, two float32 [b] by name.

    Args:
      adapter_rows: rows of all adapters; at least one.
      outputs: outputs of a model with these rows.
      batch: [B, S].
    """
    losses = {}
    for rows in adapter_rows:
        if is_classifier(rows.method):
            part = Batch(*(take_rows(rows, array) for array in batch))
            losses[rows.name] = label_losses(outputs.scores[rows.name], part)
    others = [rows for rows in adapter_rows if not is_classifier(rows.method)]
    if not others:
        return losses
    assert outputs.token_losses is not None
    if len(others) < len(adapter_rows):
        batch = Batch(*(take_rows_of_adapters(others, array) for array in batch))
    sums = sum_by_row(outputs.token_losses, batch)
    methods = {rows.name: rows.method for rows in others}
    totals = {rows.name: rows.total for rows in others}
    for rows in divide_rows(methods, totals, others[0].shards):
        row_sums, targets = (take_rows(rows, array) for array in sums)
        losses[rows.name] = row_sums, targets
    return losses


def target_counts(rows: AdapterRows, loss_mask: jax.Array) -> jax.Array:
    """Number of targets of each of an adapter's rows, float32 [..., b], of `loss_mask` [..., b, S].

    Targets are the predicted tokens; a row of a classification adapter has one.
    """
    if is_classifier(rows.method):
        return jnp.any(loss_mask, axis=-1).astype(jnp.float32)
    return jnp.sum(loss_mask[..., 1:], axis=-1, dtype=jnp.float32)
