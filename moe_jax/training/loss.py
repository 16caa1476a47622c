"""Next-token cross-entropy over the tokens that are to be learned."""

import jax
import jax.numpy as jnp

from moe_jax.data.batch import Batch


def row_losses(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy per row, as sums, so that the caller decides over what to average.

    Args:
      logits: float32 [B, S, V]; position s predicts the token at s + 1.
      batch: [B, S]; `loss_mask` marks the tokens that are predicted.

    Returns:
      Sum of the losses in nats, float32 [B], and number of predicted tokens, float32 [B].
    """
    targets, mask = batch.tokens[:, 1:], batch.loss_mask[:, 1:].astype(jnp.float32)
    logits = logits[:, :-1]
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.sum(losses * mask, axis=-1), jnp.sum(mask, axis=-1)


def target_count(loss_mask: jax.Array) -> jax.Array:
    """Number of predicted tokens per row, float32 [..., B], of loss_mask [..., B, S]."""
    return jnp.sum(loss_mask[..., 1:], axis=-1, dtype=jnp.float32)
