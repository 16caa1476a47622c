"""Experts on a single projection, mixed by a router on the projection's input.

The common part of LoRAMoE and MoLA. MixLoRA has one router for a whole FFN; here every projection
mixes the deltas of its own experts, so that there is one sum and no slots:

    y = x W + s sum_e w_e(x) (x A_e) B_e
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.lora.low_rank import ExpertLora, LowRankConfig
from moe_jax.adapters.method import AdapterContext, AdapterMethod, FrozenProjection
from moe_jax.adapters.routing.losses import RouterLoss, check_losses
from moe_jax.adapters.routing.router import ROUTERS, Router, RouterLogits
from moe_jax.adapters.routing.statistics import sow_routing
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import field_prefix, require
from moe_jax.layers.dropout import dropout
from moe_jax.layers.names import LOW_RANK


def layer_group(layer_index: Any, num_groups: int, num_layers: int) -> Any:
    """Index of a layer's group, where `num_layers` are divided into equal consecutive groups.

    Args:
      layer_index: index of the layer; an int, or an integer array of NumPy or JAX.
      num_groups: number of groups.
      num_layers: number of layers.
    """
    return layer_index * num_groups // num_layers


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(AdapterMethod):
    """Base class of methods that mix experts on each projection.

    Attributes:
      router: routing strategy, chosen by `router.name`; each projection has its own router.
      losses: auxiliary losses of the routers by name; see `moe_jax.adapters.routing.losses`. Of
        several routers in a layer, losses are averaged.
    """

    router: Router
    losses: Mapping[str, RouterLoss] = field(default_factory=FrozenDict)

    @property
    def is_additive(self) -> bool:
        return not self.dora

    @property
    def routes(self) -> bool:
        return True

    @property
    def router_losses(self) -> Mapping[str, RouterLoss]:
        return self.losses

    def check_model(self, model: ModelConfig) -> None:
        super().check_model(model)
        with field_prefix("router"):
            self.router.check_depth(model.num_layers)

    def _check_experts(self, counts: Sequence[int]) -> None:
        """Refuses settings that do not fit layers with these numbers of experts."""
        require(min(counts) > 1, "num_experts", "must be at least 2; for one use 'lora'")
        with field_prefix("router"):
            require(
                not self.router.limits_load,
                "name",
                f"{ROUTERS.name_of(self.router)!r} limits how many tokens an expert serves, which "
                "only methods that route whole FFNs, like 'mixlora', support; use another",
            )
            self.router.check(min(counts))
        for count in sorted(set(counts)):
            check_losses(self.losses, count)


class ProjectionMixture(nn.Module):
    """One projection with experts.

    Attributes:
      low_rank: settings of each expert's pair.
      router: routing strategy.
      experts: number of experts of each of equal groups of consecutive layers.
      axes: logical axes of the projection's kernel, (in, out).

    All layers have leaves for E experts, the largest number. In a layer with fewer, the last ones
    are absent: no token reaches them, their router logits are `ABSENT`, and their leaves start at
    zero (DoRA's magnitudes at the norms of W) and get no gradient.

    Leaves: `router/kernel` [in, E], and the pairs; see `ExpertLora`.
    """

    low_rank: LowRankConfig
    router: Router
    experts: tuple[int, ...]
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
        router, num_experts = self.router, max(self.experts)
        present = self._present(context)
        logits = RouterLogits(router, num_experts, self.axes[0], name="router")(
            x, deterministic=deterministic, present=present
        )
        routing = router.route(logits, context.token_mask)
        routed = router.routes_layer(context.layer_index)
        sow_routing(
            self,
            routing,
            context.token_mask,
            routed=routed,
            present=present,
            expert_groups=context.expert_groups,
            segment_ids=context.segment_ids,
        )
        experts = ExpertLora(self.low_rank, num_experts, self.axes)
        nn.share_scope(self, experts)  # the leaves belong to this module, as those of `Lora` do
        pairs = experts(frozen.kernel, present)
        if self.low_rank.dropout and not deterministic:
            # One mask for all experts of a token.
            x = dropout(x, self.low_rank.dropout, context.input_key())
        flat = lambda array: array.reshape(-1, *array.shape[2:])
        z, combine = checkpoint_name((pairs.activations(flat(x)), flat(routing.combine)), LOW_RANK)
        adapted = pairs.adapt(flat(frozen.product), z, combine).reshape(frozen.product.shape)
        return adapted if routed is None else jnp.where(routed, adapted, frozen.product)

    def _present(self, context: AdapterContext) -> jax.Array | None:
        """The experts that the layer has, bool [E]; None if all layers have the same number."""
        if len(set(self.experts)) == 1:
            return None
        group = layer_group(context.layer_index, len(self.experts), context.num_layers)
        return jnp.arange(max(self.experts)) < jnp.array(self.experts)[group]
