"""LoRAMoE: several LoRA pairs on every FFN projection, softly mixed (arXiv:2312.09979)."""

from dataclasses import dataclass, field

import flax.linen as nn

from moe_jax.adapters.lora.lora import Lora
from moe_jax.adapters.method import METHODS
from moe_jax.adapters.mixtures.mixture import MixtureConfig, ProjectionMixture
from moe_jax.adapters.routing.router import Router
from moe_jax.adapters.routing.strategies import SoftRouter
from moe_jax.adapters.tree import MLP_MODULES
from moe_jax.config.parse import require


@METHODS.register("loramoe")
@dataclass(frozen=True, kw_only=True)
class LoraMoeConfig(MixtureConfig):
    """LoRAMoE: experts on the targeted FFN projections, LoRA on the targeted attention projections.

    Each FFN projection has its own router, on its own input (for `down_proj` the hidden
    activation). The paper mixes all experts; other routers are a departure from it. Its constraint
    on the routers is the loss `localized_balance`, which needs the kind of each data set
    (`expert_group`).

    The paper's code initializes the router kernels uniformly within 1 / sqrt(inputs); here they
    have the standard deviation `router.init_std` at every width.

    Attributes:
      num_experts: number of experts of each projection, E.
    """

    num_experts: int
    router: Router = field(default_factory=SoftRouter)

    def __post_init__(self):
        super().__post_init__()
        require(
            any(target in MLP_MODULES for target in self.target_modules),
            "target_modules",
            f"LoRAMoE needs at least one of {', '.join(MLP_MODULES)}; without experts use 'lora'",
        )
        self._check_experts((self.num_experts,))

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        if target not in self.target_modules:
            return None
        if target not in MLP_MODULES:
            return Lora(self.low_rank, axes)
        return ProjectionMixture(self.low_rank, self.router, (self.num_experts,), axes)
