"""The trainable leaves of a projection's experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.dora import dora_gains
from moe_jax.adapters.leaf import adapter_leaf
from moe_jax.adapters.low_rank import LoraA, LoraB, LowRankConfig, Pairs
from moe_jax.layers.quantized import Kernel
from moe_jax.sharding.axes import EXPERTS, RANK


class ExpertPairs(nn.Module):
    """The low-rank pairs of all experts of one projection.

    Attributes:
      low_rank: what each pair is.
      num_experts: E.
      axes: logical axes of the projection's kernel, (in, out).

    Leaves: `lora_A` [in, E, R], `lora_B` [E, R, out]; with DoRA `magnitude` [E, out].
    """

    low_rank: LowRankConfig
    num_experts: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, kernel: Kernel, present: jax.Array | None = None) -> Pairs:
        """The pairs on a frozen kernel [in, out].

        Args:
          kernel: the frozen kernel.
          present: bool [E], the experts that this layer has. The others start at zero, A too, and
            as no token reaches them they stay there. None stands for all.
        """
        config, (fan_in, features) = self.low_rank, kernel.shape
        experts, rank = self.num_experts, config.rank

        def init_a(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            drawn = config.init_a(fan_in)(key, shape, dtype)
            return drawn if present is None else drawn * present[:, None]

        axes_a, axes_b = (self.axes[0], EXPERTS, RANK), (EXPERTS, RANK, self.axes[1])
        lora_a = adapter_leaf(self, "lora_A", init_a, (fan_in, experts, rank), axes_a)
        zeros = nn.initializers.zeros
        lora_b = adapter_leaf(self, "lora_B", zeros, (experts, rank, features), axes_b)
        if not config.dora:
            return Pairs(LoraA(lora_a, config.scale), LoraB(lora_b, None))
        axes = (EXPERTS, self.axes[1])
        gains = dora_gains(self, kernel, lora_a, lora_b, config.scale, axes)
        return Pairs(LoraA(lora_a, config.scale), LoraB(lora_b * gains[:, None], gains))
