"""The frozen linear map that everything else is added to."""

import flax.linen as nn
import jax
import jax.numpy as jnp

BASE_INIT = nn.initializers.normal(stddev=0.02)
"""Used for random models only; real ones are loaded."""


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
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(BASE_INIT, self.axes),
            (x.shape[-1], self.features),
            self.param_dtype,
        )
        y = jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]),
                (self.features,),
                self.param_dtype,
            )
            y = y + bias.astype(self.dtype)
        return y
