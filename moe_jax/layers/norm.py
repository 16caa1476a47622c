"""Root-mean-square normalization (arXiv:1910.07467, eq. 4), and layer norms without a bias."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.frozen import frozen_leaf
from moe_jax.sharding.axes import NORM


def unit_rms(x: jax.Array, epsilon: float) -> jax.Array:
    """`x` divided by its root mean square over the last axis, float32."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return x32 * jax.lax.rsqrt(mean_square + epsilon)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32, then scales.

    Attributes:
      epsilon: added to the mean square.
      dtype: dtype of the result.
      param_dtype: dtype of the stored scale.
      unit_offset: multiplies by one plus the stored scale.
      centered: subtracts the mean first, as layer norms do (arXiv:1607.06450, eq. 4).
    """

    epsilon: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    unit_offset: bool = False
    centered: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = frozen_leaf(self, "scale", init, x.shape[-1:], (NORM,), self.param_dtype)
        scale = scale.astype(jnp.float32)
        if self.unit_offset:
            scale = 1.0 + scale
        x32 = x.astype(jnp.float32)
        if self.centered:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = unit_rms(x32, self.epsilon)
        return (normed * jnp.broadcast_to(scale, x.shape)).astype(self.dtype)
