"""Token embedding and language-model head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.activation import soft_cap
from moe_jax.layers.frozen import BASE_INIT, frozen_leaf
from moe_jax.sharding.axes import ACTIVATION_EMBED, EMBED, HIDDEN_AXES, VOCAB, constrain


class TokenEmbedding(nn.Module):
    """Embedding table of the tokens.

    Attributes:
      vocab_size: V.
      features: D.
      dtype: type of the result.
      param_dtype: type of the stored table.
      scale: factor of the result, rounded to `dtype`; None for 1.

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
        """Embeddings [B, S, D] of tokens [B, S]."""
        # Gather whole rows before the look-up: a table split along D gives a result split along D,
        # which XLA's partitioner can only reshard to B by replicating it.
        table = constrain(self.embedding, (VOCAB, ACTIVATION_EMBED))
        return self.scaled(
            constrain(jnp.take(table, tokens, axis=0).astype(self.dtype), HIDDEN_AXES)
        )

    def scaled(self, rows: jax.Array) -> jax.Array:
        """Rows of a table, in `dtype`, times the factor of the result."""
        return rows if self.scale is None else rows * jnp.asarray(self.scale, self.dtype)


class LanguageModelHead(nn.Module):
    """Kernel of `logits`, for models with untied embeddings.

    Attributes:
      vocab_size: V.
      features: D.
      param_dtype: type of the stored kernel.

    Leaf: `kernel` [D, V].
    """

    vocab_size: int
    features: int
    param_dtype: jnp.dtype

    def setup(self) -> None:
        shape = (self.features, self.vocab_size)
        self.kernel = frozen_leaf(
            self, "kernel", BASE_INIT, shape, (EMBED, VOCAB), self.param_dtype
        )


def logits(
    x: jax.Array, kernel: jax.Array, *, tied: bool = False, cap: float | None = None
) -> jax.Array:
    """Logits float32 [B, S, V]; the product is computed in the dtype of `x`.

    Args:
      x: hidden states [B, S, D].
      kernel: [D, V].
      tied: the kernel is an embedding [V, D] instead.
      cap: bound of the logits, see `soft_cap`, or None.
    """
    axes = "...d,vd->...v" if tied else "...d,dv->...v"
    scores = jnp.einsum(axes, x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return scores if cap is None else soft_cap(scores, cap)
