"""What an adapter sees of the frozen model around it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.layers.quantized import Kernel
from moe_jax.layers.token_blocks import block_length


class FrozenProjection(NamedTuple):
    """A frozen projection applied to the adapter's rows.

    Attributes:
      product: x W, [b, S, out], without the bias, which is added after all adapters.
      kernel: W, [in, out].
    """

    product: jax.Array
    kernel: Kernel


class FrozenFFN(NamedTuple):
    """A gated FFN around the adapter's rows, up to its down projection.

    Attributes:
      gate, up: the products with the FFN's input, [b, S, F] each.
      gate_bias, up_bias, down_bias: [F], [F] and [D]; None where there is none. The adapter adds
        the first two; the last is added after it, once.
      down_kernel: [F, D].
      activation: of the gate.
    """

    gate: FrozenProjection
    up: FrozenProjection
    gate_bias: jax.Array | None
    up_bias: jax.Array | None
    down_kernel: Kernel
    down_bias: jax.Array | None
    activation: Callable[[jax.Array], jax.Array]


class AdapterContext(NamedTuple):
    """What an adapter knows of its rows and its place.

    Attributes:
      token_mask: bool [b, S], false at padding.
      layer_index: int32 [], from 0.
      num_layers: L.
      expert_groups: int32 [b, S], the group of experts that each token's sequence belongs to, 0 at
        padding (see `SourceConfig.expert_group`); None unless one of the adapter's losses reads it.
      segment_ids: int32 [b, S] as in `Batch`; None where every row is one sequence. Whatever counts
        by sequence must heed it.
      shards: over how many devices, or groups of them, the rows are divided.
      block_tokens: see `ComputeConfig.block_tokens`.
      recomputes: whether the backward pass computes activations again.
    """

    token_mask: jax.Array
    layer_index: jax.Array
    num_layers: int
    expert_groups: jax.Array | None = None
    segment_ids: jax.Array | None = None
    shards: int = 1
    block_tokens: int | None = None
    recomputes: bool = True

    def block_length(self, tokens: int, width: int, dtype: jnp.dtype) -> int:
        """Of so many tokens of a device, how many to compute at a time; see `block_length`.

        Args:
          tokens: of a device.
          width: of the widest array [tokens, width].
          dtype: its type.
        """
        return block_length(tokens, width, dtype, self.block_tokens)
