"""The score head of an adapter that classifies."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.rows import Segment, take_rows
from moe_jax.adapters.tree import adapter_leaf, module_name
from moe_jax.config.classification import ClassificationConfig
from moe_jax.layers.vocabulary import logits
from moe_jax.sharding.axes import EMBED, LABELS


class Predictions(NamedTuple):
    """What a model with classification adapters computes.

    Attributes:
      logits: for the next token, float32 [b, S, V], of the rows that belong to no classification
        adapter, in the order of the batch; None where all rows do.
      scores: by classification adapter, float32 [b, N] of its rows.
      token_losses: float32 [b, S], in the place of `logits` where these were not asked for.
    """

    logits: jax.Array | None
    scores: dict[str, jax.Array]
    token_losses: jax.Array | None = None


class ScoreHead(nn.Module):
    """Scores of one adapter's rows, without bias, as transformers' `score` computes them.

    Leaf: `kernel` [D, N].
    """

    classification: ClassificationConfig

    @nn.compact
    def __call__(self, last: jax.Array) -> jax.Array:
        """float32 [b, N] of the last tokens' hidden states [b, D]."""
        init = nn.initializers.normal(stddev=self.classification.init_std)
        shape = (last.shape[-1], self.classification.num_scores)
        return logits(last, adapter_leaf(self, "kernel", init, shape, (EMBED, LABELS)))


class ScoreHeads(nn.Module):
    """The score heads of all classification adapters; gives them a place in the adapters' trees."""

    segments: tuple[Segment, ...]

    @nn.compact
    def __call__(self, x: jax.Array, token_mask: jax.Array) -> dict[str, jax.Array]:
        """By adapter, the scores float32 [b, N] of its rows.

        Args:
          x: hidden states after the last norm, [B, S, D].
          token_mask: bool [B, S], false at padding; a row's last token is the last true place.
        """
        scores = {}
        for segment in classifying(self.segments):
            assert segment.method.classification is not None
            head = ScoreHead(segment.method.classification, name=module_name(segment.name))
            place = last_place(take_rows(segment, token_mask))[:, None, None]
            last = jnp.take_along_axis(take_rows(segment, x), place, axis=1)[:, 0]
            scores[segment.name] = head(last)
        return scores


def classifying(segments: Sequence[Segment]) -> list[Segment]:
    """The segments of classification adapters."""
    return [segment for segment in segments if segment.method.classification is not None]


def last_place(mask: jax.Array) -> jax.Array:
    """The last true place of each row of a bool [B, S], int32 [B]; 0 where there is none."""
    return jnp.max(jnp.arange(mask.shape[-1]) * mask, axis=-1)
