"""From the last hidden state to logits over the vocabulary."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.leaf import BASE_INIT, frozen_leaf
from moe_jax.sharding.axes import EMBED, VOCAB


class LanguageModelHead(nn.Module):
    """A projection of its own, for models that do not reuse their embedding.

    Leaf: `kernel` [D, V].
    """

    vocab_size: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.vocab_size)
        kernel = frozen_leaf(self, "kernel", BASE_INIT, shape, (EMBED, VOCAB), self.param_dtype)
        return logits(x, kernel)


def logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """float32 [B, S, V] of x [B, S, D] and kernel [D, V], multiplied in the type of `x`."""
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
