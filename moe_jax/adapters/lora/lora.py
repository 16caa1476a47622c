"""LoRA: a low-rank delta on a frozen projection (arXiv:2106.09685, eq. 3); also rsLoRA and DoRA."""

from dataclasses import dataclass

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.lora.dora import apply_gains, dora_gains
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS, AdapterContext, AdapterMethod, FrozenProjection
from moe_jax.layers.dropout import dropout
from moe_jax.layers.frozen import adapter_leaf
from moe_jax.layers.names import LOW_RANK
from moe_jax.layers.tokens import token_product
from moe_jax.sharding.axes import RANK


class Lora(nn.Module):
    """Adds `s (x A) B` to a projection's frozen product; with DoRA, times its gains.

    Attributes:
      low_rank: settings of the pair.
      axes: logical axes of the projection's kernel, (in, out).

    Leaves: `lora_A` [in, R], `lora_B` [R, out]; with DoRA `magnitude` [out].
    """

    low_rank: LowRankConfig
    axes: tuple[str, str]

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        frozen: FrozenProjection,
        context: AdapterContext,
        *,
        deterministic: bool,
    ) -> jax.Array:
        """See `AdapterMethod.projection_adapter`."""
        config, (fan_in, features) = self.low_rank, frozen.kernel.shape
        axes_a, axes_b = (self.axes[0], RANK), (RANK, self.axes[1])
        init_a, zeros = config.init_a(fan_in), nn.initializers.zeros
        lora_a = adapter_leaf(self, "lora_A", init_a, (fan_in, config.rank), axes_a)
        lora_b = adapter_leaf(self, "lora_B", zeros, (config.rank, features), axes_b)
        product = frozen.product
        if config.dora:
            gains = dora_gains(self, frozen.kernel, lora_a, lora_b, config.scale, self.axes[1:])
            product, lora_b = apply_gains(product, gains), lora_b * gains[None]
        if config.dropout and not deterministic:
            x = dropout(x, config.dropout, context.input_key())
        z = checkpoint_name(token_product(x, lora_a.astype(x.dtype)) * config.scale, LOW_RANK)
        return product + token_product(z, lora_b.astype(x.dtype))


@METHODS.register("lora")
@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterMethod):
    """Plain LoRA on any of the seven projections; `rslora` and `dora` make it rsLoRA and DoRA."""

    @property
    def is_additive(self) -> bool:
        return not self.dora

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        return Lora(self.low_rank, axes) if target in self.target_modules else None
