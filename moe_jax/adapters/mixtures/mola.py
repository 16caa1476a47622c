"""MoLA: LoRA experts on every projection, their number depending on depth (arXiv:2402.08562)."""

from dataclasses import dataclass, field

import flax.linen as nn

from moe_jax.adapters.method import METHODS
from moe_jax.adapters.mixtures.mixture import MixtureConfig, ProjectionMixture
from moe_jax.adapters.routing.router import Router
from moe_jax.adapters.routing.strategies import TopKRouter
from moe_jax.adapters.tree import MLP_MODULES
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import require


@METHODS.register("mola")
@dataclass(frozen=True, kw_only=True)
class MolaConfig(MixtureConfig):
    """MoLA: experts and a router on every targeted projection, attention included.

    The paper divides 32 layers into four groups with, from the bottom, 2-4-6-8 experts (its best),
    8-6-4-2, 8-2-2-8 or 5-5-5-5, two experts per token, and rank 8 and alpha 16 on all seven
    projections.

    All layers run in one scanned program and have the same shapes: leaves, optimizer moments and
    products for max(num_experts) experts. The experts that a layer lacks are zero and cost as much
    as the others: 2-4-6-8 costs the same as 8-8-8-8.

    Losses are computed for each router and averaged (`per_layer`). The scope `pooled` sums the
    statistics of all layers at one projection, and so needs equal numbers of experts in all layers.

    Attributes:
      num_experts: number of experts of each of equal groups of consecutive layers; one entry for
        all layers.
    """

    num_experts: tuple[int, ...]
    router: Router = field(default_factory=TopKRouter)

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.num_experts), "num_experts", "names no number of experts")
        self._check_experts(self.num_experts)
        for name, loss in self.losses.items():
            require(
                loss.scope != "pooled" or len(set(self.num_experts)) == 1,
                f"losses.{name}.scope",
                "layers with different numbers of experts cannot be pooled; use 'per_layer'",
            )

    def check_model(self, model: ModelConfig) -> None:
        super().check_model(model)
        groups = len(self.num_experts)
        require(
            model.num_layers % groups == 0,
            "num_experts",
            f"the model's {model.num_layers} layers cannot be divided into {groups} equal groups; "
            f"give a number of entries that divides {model.num_layers}",
        )
        attention = [name for name in self.target_modules if name not in MLP_MODULES]
        require(
            not attention or model.has_equal_layers,
            "target_modules",
            f"experts on {', '.join(attention)} need attention of one kind, and a model of type "
            f"{model.model_type!r} has two; name {', '.join(MLP_MODULES)} only",
        )

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        if target not in self.target_modules:
            return None
        return ProjectionMixture(self.low_rank, self.router, self.num_experts, axes)
