"""LoRAMoE's localized balancing constraint: an auxiliary loss that knows the kinds of data."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.adapters.aux_losses import ROUTER_LOSSES, RouterLoss
from moe_jax.adapters.statistics import RouterStatistics
from moe_jax.config.data import DataConfig
from moe_jax.config.parse import require


@ROUTER_LOSSES.register("localized_balance")
@dataclass(frozen=True, kw_only=True)
class LocalizedBalance(RouterLoss):
    """Balance within a group of experts, and a chosen imbalance between groups.

    LoRAMoE (arXiv:2312.09979, "Localized Balancing Constraint"). The experts of a layer are divided
    into equal groups, the first E / num_groups of them and so on, and each data set belongs to one
    (`expert_group` in its configuration). With Q[b, e] the mean weight of expert e in sequence b,

        Z[b, e] = Q[b, e] * (1 + delta if e is of the group of b, else 1 - delta)
        loss    = var(Z) / mean(Z)^2

    over all sequences and experts, with the population's variance. It is 0 where Z is constant,
    that is where Q is inversely proportional to the factor: for a positive delta the experts of a
    sequence's own group get the *smaller* share, (1 - delta) / (1 + delta) of the others'. A
    negative delta gives them the larger one.

    The paper divides by mean(Z), its authors' code by the square, which they confirmed to be what
    is meant (issue 3 of Ablustrund/LoRAMoE); the scale of Z then does not matter. Q is the mean
    over a sequence's tokens and not the sum, as a long sequence is no imbalance. (Their code sums
    over rows of one length, padding included.)

    With delta 0 and a single sequence it is `importance_cv`.

    Attributes:
      delta: in (-1, 1).
      num_groups: into how many equal groups the experts of a layer are divided.
    """

    delta: float = 0.1
    num_groups: int = 2

    def __post_init__(self):
        super().__post_init__()
        require(-1.0 < self.delta < 1.0, "delta", "must lie in (-1, 1)")
        require(self.num_groups > 1, "num_groups", "must be at least 2")

    @property
    def by_sequence(self) -> bool:
        return True

    def check(self, num_experts: int) -> None:
        require(
            num_experts % self.num_groups == 0,
            "num_groups",
            f"{num_experts} experts cannot be divided into {self.num_groups} equal groups",
        )

    def check_data(self, data: DataConfig) -> None:
        for name, source in data.train.items():
            require(
                source.expert_group < self.num_groups,
                f"train.{name}.expert_group",
                f"{source.expert_group}, but localized_balance divides the experts into "
                f"{self.num_groups} groups, numbered from 0",
            )
        given = {source.expert_group for source in data.train.values()}
        missing = min(set(range(self.num_groups)) - given, default=None)
        require(
            missing is None,
            "train",
            f"no data set has expert_group {missing}, but localized_balance divides the experts "
            f"into {self.num_groups} groups; set expert_group, or leave the loss out",
        )

    def of_layer(self, statistics: RouterStatistics) -> jax.Array:
        sequences = statistics.sequences
        if sequences is None:
            raise ValueError("localized_balance needs the expert group of every sequence")
        experts = jnp.arange(sequences.weights.shape[-1], dtype=jnp.float32)
        group = jnp.floor_divide(experts * self.num_groups, statistics.num_experts)
        is_own = sequences.group[:, None] == group
        z = sequences.weights * jnp.where(is_own, 1.0 + self.delta, 1.0 - self.delta)
        counted = sequences.real[:, None] * statistics.present
        count = jnp.maximum(jnp.sum(counted), 1.0)
        mean = jnp.sum(counted * z) / count
        variance = jnp.sum(counted * jnp.square(z - mean)) / count
        # All is zero without tokens. The floor's square, which the gradient divides by, is not.
        return variance / jnp.maximum(jnp.square(mean), 1e-12)
