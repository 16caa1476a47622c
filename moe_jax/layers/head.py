"""From the last hidden state to logits over the vocabulary."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.leaf import BASE_INIT, frozen_leaf
from moe_jax.layers.soft_cap import soft_cap
from moe_jax.sharding.axes import EMBED, VOCAB


class LanguageModelHead(nn.Module):
    """The kernel of `logits`, for models that do not reuse their embedding.

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
    """float32 [B, S, V] of x [B, S, D], multiplied in the type of `x`.

    Args:
      x: hidden states.
      kernel: [D, V].
      tied: the kernel is an embedding [V, D] instead.
      cap: bound of the logits, see `soft_cap`; None for none.
    """
    axes = "...d,vd->...v" if tied else "...d,dv->...v"
    scores = jnp.einsum(axes, x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return scores if cap is None else soft_cap(scores, cap)
