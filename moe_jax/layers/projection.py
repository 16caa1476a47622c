"""The frozen linear map that everything else is added to."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.layers.kept_names import NARROW_PRODUCT, WIDE_PRODUCT
from moe_jax.layers.leaf import frozen_kernel, frozen_leaf
from moe_jax.layers.quantized import frozen_product
from moe_jax.layers.storage import Storage
from moe_jax.sharding.axes import MLP


class FrozenLinear(nn.Module):
    """The parameters of `y = x @ kernel + bias`, with `kernel` stored as [in, out].

    Attributes:
      in_features: width of the input.
      features: width of the result.
      axes: logical axes of the kernel, (in, out).
      use_bias: whether there is a bias.
      dtype: type in which the product is computed.
      storage: types in which the parameters are stored.
    """

    in_features: int
    features: int
    axes: tuple[str, str]
    use_bias: bool
    dtype: jnp.dtype
    storage: Storage

    def setup(self) -> None:
        shape = (self.in_features, self.features)
        self.kernel = frozen_kernel(self, "kernel", shape, self.axes, self.storage)
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = frozen_leaf(self, "bias", zeros, shape[1:], self.axes[1:], self.storage.dtype)
            self.bias = bias.astype(self.dtype)
        else:
            self.bias = None

    def product(self, x: jax.Array) -> jax.Array:
        """`x @ kernel`, without the bias."""
        name = WIDE_PRODUCT if self.axes[1] == MLP else NARROW_PRODUCT
        return checkpoint_name(frozen_product(x.astype(self.dtype), self.kernel), name)
