"""From token ids to the first hidden state."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.leaf import BASE_INIT, frozen_leaf
from moe_jax.sharding.axes import ACTIVATION_EMBED, EMBED, HIDDEN_AXES, VOCAB, constrain


class TokenEmbedding(nn.Module):
    """Looks rows up in a table.

    Attributes:
      vocab_size: V.
      features: D.
      dtype: type of the result.
      param_dtype: type of the stored table.
      scale: what rows are multiplied by, itself rounded to `dtype`; None leaves them as they are.

    Leaf: `embedding` [V, D].
    """

    vocab_size: int
    features: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    scale: float | None = None

    def setup(self) -> None:
        shape = (self.vocab_size, self.features)
        self.embedding = frozen_leaf(
            self, "embedding", BASE_INIT, shape, (VOCAB, EMBED), self.param_dtype
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, S, D] of tokens [B, S]."""
        # Whole rows on every device before the look-up: a table split along D would give a result
        # split along D, which the partitioner can only turn into one split along B by replicating.
        table = constrain(self.embedding, (VOCAB, ACTIVATION_EMBED))
        rows = constrain(jnp.take(table, tokens, axis=0).astype(self.dtype), HIDDEN_AXES)
        return rows if self.scale is None else rows * jnp.asarray(self.scale, self.dtype)
