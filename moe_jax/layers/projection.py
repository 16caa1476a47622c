"""The frozen linear map that everything else is added to."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.leaf import BASE_INIT, frozen_leaf


class FrozenLinear(nn.Module):
    """`y = x @ kernel + bias`, with `kernel` stored as [in, out].

    Attributes:
      features: width of the result.
      axes: logical axes of the kernel, (in, out).
      use_bias: whether there is a bias.
      dtype: type in which the product is computed.
      param_dtype: type in which the parameters are stored.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.project(x)

    def project(self, x: jax.Array) -> jax.Array:
        """The frozen product alone; for compact methods of subclasses."""
        shape = (x.shape[-1], self.features)
        kernel = frozen_leaf(self, "kernel", BASE_INIT, shape, self.axes, self.param_dtype)
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = frozen_leaf(self, "bias", zeros, shape[1:], self.axes[1:], self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y
