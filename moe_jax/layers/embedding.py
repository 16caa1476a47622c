"""From token ids to the first hidden state."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.axes import ACTIVATION_EMBED, EMBED, HIDDEN_AXES, VOCAB, constrain
from moe_jax.layers.projection import BASE_INIT


class TokenEmbedding(nn.Module):
    """Looks rows up in a table.

    Leaf: `embedding` [V, D].
    """

    vocab_size: int
    features: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self):
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(BASE_INIT, (VOCAB, EMBED)),
            (self.vocab_size, self.features),
            self.param_dtype,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, S, D] of tokens [B, S]."""
        # Whole rows on every device before the look-up: a table split along D would give a result
        # split along D, which the partitioner can only turn into one split along B by replicating.
        table = constrain(self.embedding, (VOCAB, ACTIVATION_EMBED))
        return constrain(jnp.take(table, tokens, axis=0).astype(self.dtype), HIDDEN_AXES)
