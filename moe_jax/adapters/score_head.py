"""The score heads of classification adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import AdapterRows, take_rows
from moe_jax.config.classification import ClassificationConfig
from moe_jax.layers.frozen import adapter_leaf
from moe_jax.layers.vocabulary import logits
from moe_jax.sharding.axes import EMBED, LABELS


class ScoreHead(nn.Module):
    """A linear layer without bias on the last token's hidden state, as transformers' `score`.

    Leaf: `kernel` [D, N].
    """

    classification: ClassificationConfig

    @nn.compact
    def __call__(self, last: jax.Array) -> jax.Array:
        """Scores, float32 [b, N], of the last tokens' hidden states [b, D]."""
        init = nn.initializers.normal(stddev=self.classification.init_std)
        shape = (last.shape[-1], self.classification.num_scores)
        return logits(last, adapter_leaf(self, "kernel", init, shape, (EMBED, LABELS)))


class ScoreHeads(nn.Module):
    """The score heads of all classification adapters, at the path `score` of their trees."""

    adapter_rows: tuple[AdapterRows, ...]

    @nn.compact
    def __call__(self, hidden: jax.Array, token_mask: jax.Array) -> dict[str, jax.Array]:
        """Scores float32 [b, N] of the rows of each classification adapter, by name.

        Args:
          hidden: hidden states after the final norm, [B, S, D].
          token_mask: bool [B, S], false at padding; the last true position is a row's last token.
        """
        scores = {}
        for rows in self.adapter_rows:
            if rows.method.classification is None:
                continue
            head = ScoreHead(rows.method.classification, name=rows.module_name)
            last = last_position(take_rows(rows, token_mask))[:, None, None]
            scores[rows.name] = head(
                jnp.take_along_axis(take_rows(rows, hidden), last, axis=1)[:, 0]
            )
        return scores


def is_classifier(method: AdapterMethod) -> bool:
    """True for an adapter with a score head in place of the language-model head."""
    return method.classification is not None


def last_position(mask: jax.Array) -> jax.Array:
    """The last true position of each row of a bool [B, S], int32 [B]; 0 where there is none."""
    return jnp.max(jnp.arange(mask.shape[-1])[None] * mask.astype(jnp.int32), axis=-1)
