"""Auxiliary losses of routers, computed from the statistics that the layers sow.

A loss is a frozen dataclass, its configuration, that computes a scalar from the statistics of one
layer. `total_loss` averages it over the layers, or applies it to the sum of their statistics. To
add a loss, derive it from `RouterLoss` and decorate it with `@ROUTER_LOSSES.register("its_name")`.
"""

import abc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from moe_jax.adapters.routing.statistics import RouterStatistics
from moe_jax.config.metric_names import METRICS
from moe_jax.config.parse import Registry, field_prefix, require

ROUTER_LOSSES = Registry("loss")
"""Losses by the name in a configuration: `losses.NAME`, or the field `name` in it."""


@dataclass(frozen=True, kw_only=True)
class RouterLoss(abc.ABC):
    """Base class of all auxiliary losses.

    Attributes:
      coefficient: weight in the total loss.
      scope: `per_layer` averages the loss over the layers that route; `pooled` computes it from the
        summed statistics of all layers, as transformers does, and cannot see layers that collapse
        onto different experts.
    """

    registry: ClassVar[Registry] = ROUTER_LOSSES

    coefficient: float
    scope: Literal["per_layer", "pooled"] = "per_layer"

    def __post_init__(self):
        require(self.coefficient >= 0, "coefficient", "must not be negative")

    @property
    def needs_sequences(self) -> bool:
        """True if the loss reads `RouterStatistics.sequences`, which is computed only then."""
        return False

    def check(self, num_experts: int) -> None:  # noqa: B027  optional
        """Refuses, with `require`, settings that do not fit this number of experts."""

    def check_expert_groups(self, groups: Mapping[str, int]) -> None:  # noqa: B027  optional
        """Refuses, with `require`, expert groups of the training data sets that do not fit.

        Args:
          groups: `SourceConfig.expert_group` of each training data set, by name.
        """

    @abc.abstractmethod
    def layer_loss(self, statistics: RouterStatistics) -> jax.Array:
        """Loss of one layer without the coefficient, a float32 scalar."""

    def total_loss(self, statistics: RouterStatistics) -> jax.Array:
        """Loss over all layers of one site without the coefficient.

        Args:
          statistics: statistics with a leading axis L on each field.
        """
        if self.scope == "pooled":
            return self.layer_loss(statistics.pooled())
        losses = jax.vmap(self.layer_loss)(statistics)
        routed = statistics.routed.astype(jnp.float32)
        return jnp.sum(losses * routed) / jnp.maximum(jnp.sum(routed), 1.0)


def check_losses(losses: Mapping[str, RouterLoss], num_experts: int) -> None:
    """Refuses, with `require`, losses that do not fit the number of experts, and reserved names."""
    for name, loss in losses.items():
        require(
            name not in METRICS and re.fullmatch(r"\w+", name) is not None,
            f"losses.{name}",
            "is the name of another metric, or holds more than letters, digits and '_'; choose "
            "another name, and give the kind of loss in the field 'name'",
        )
        with field_prefix(f"losses.{name}"):
            loss.check(num_experts)


@ROUTER_LOSSES.register("load_balance")
@dataclass(frozen=True, kw_only=True)
class LoadBalance(RouterLoss):
    """E * sum_e f_e P_e, with f_e the load and P_e the mean probability of expert e.

    Switch Transformer (arXiv:2101.03961, eqs. 4 to 6), for k slots as in Mixtral: f_e counts every
    slot. Perfect balance gives k, full collapse onto k experts up to E.
    """

    def layer_loss(self, statistics: RouterStatistics) -> jax.Array:
        tokens = jnp.maximum(statistics.tokens, 1.0)
        load = statistics.load_sum / tokens
        probability = statistics.probability_sum / tokens
        return statistics.num_experts * jnp.sum(load * probability)


@ROUTER_LOSSES.register("importance_cv")
@dataclass(frozen=True, kw_only=True)
class ImportanceCv(RouterLoss):
    """Squared coefficient of variation of the experts' total weights, their importance.

    Shazeer et al. (arXiv:1701.06538, eqs. 6 and 7). 0 is balance; all weight on one of E experts
    gives E - 1.
    """

    def layer_loss(self, statistics: RouterStatistics) -> jax.Array:
        importance, present = statistics.weight_sum, statistics.present
        mean = jnp.sum(importance * present) / statistics.num_experts
        variance = jnp.sum(present * jnp.square(importance - mean)) / statistics.num_experts
        # Without tokens everything is zero; the gradient divides by the square of this floor.
        return variance / jnp.maximum(jnp.square(mean), 1e-12)


@ROUTER_LOSSES.register("router_z")
@dataclass(frozen=True, kw_only=True)
class RouterZ(RouterLoss):
    """Mean squared log-partition function of the logits; ST-MoE (arXiv:2202.08906, eq. 5)."""

    def layer_loss(self, statistics: RouterStatistics) -> jax.Array:
        return statistics.squared_logsumexp_sum / jnp.maximum(statistics.tokens, 1.0)


@ROUTER_LOSSES.register("router_entropy")
@dataclass(frozen=True, kw_only=True)
class RouterEntropy(RouterLoss):
    """Mean entropy of the router's distributions, in nats; minimizing it raises their confidence.

    With top-p it keeps the number of experts small (arXiv:2403.07652).
    """

    def layer_loss(self, statistics: RouterStatistics) -> jax.Array:
        return statistics.entropy_sum / jnp.maximum(statistics.tokens, 1.0)


@ROUTER_LOSSES.register("localized_balance")
@dataclass(frozen=True, kw_only=True)
class LocalizedBalance(RouterLoss):
    """Balance within each group of experts, and a set imbalance between groups.

    LoRAMoE (arXiv:2312.09979, "Localized Balancing Constraint"). The experts of a layer are divided
    into equal groups of consecutive experts, and each data set belongs to one group (`expert_group`
    in its configuration). With Q[b, e] the mean weight of expert e in sequence b,

        Z[b, e] = Q[b, e] * (1 + delta if e is in the group of b, else 1 - delta)
        loss    = var(Z) / mean(Z)^2

    over all sequences and experts, with the population variance. It is 0 where Z is constant, that
    is where Q is inversely proportional to the factor: with a positive delta the experts of a
    sequence's own group get the *smaller* share, (1 - delta) / (1 + delta) of the others'; with a
    negative delta the larger one.

    The paper divides by mean(Z), its authors' code by the square, which they confirmed as the
    intended form (issue 3 of Ablustrund/LoRAMoE); the scale of Z then does not matter. Q is the
    mean over a sequence's tokens and not the sum, since a long sequence is not an imbalance. (Their
    code sums over rows of equal length, padding included.)

    With delta 0 and a single sequence it equals `importance_cv`.

    Attributes:
      delta: imbalance between groups, in (-1, 1).
      num_groups: number of equal groups that the experts of a layer are divided into.
    """

    delta: float = 0.1
    num_groups: int = 2

    def __post_init__(self):
        super().__post_init__()
        require(-1.0 < self.delta < 1.0, "delta", "must lie in (-1, 1)")
        require(self.num_groups > 1, "num_groups", "must be at least 2")

    @property
    def needs_sequences(self) -> bool:
        return True

    def check(self, num_experts: int) -> None:
        require(
            num_experts % self.num_groups == 0,
            "num_groups",
            f"{num_experts} experts cannot be divided into {self.num_groups} equal groups",
        )

    def check_expert_groups(self, groups: Mapping[str, int]) -> None:
        for name, group in groups.items():
            require(
                group < self.num_groups,
                f"train.{name}.expert_group",
                f"{group}, but localized_balance divides the experts into "
                f"{self.num_groups} groups, numbered from 0",
            )
        missing = min(set(range(self.num_groups)) - set(groups.values()), default=None)
        require(
            missing is None,
            "train",
            f"no data set has expert_group {missing}, but localized_balance divides the experts "
            f"into {self.num_groups} groups; set expert_group, or leave the loss out",
        )

    def layer_loss(self, statistics: RouterStatistics) -> jax.Array:
        sequences = statistics.sequences
        if sequences is None:
            raise ValueError("localized_balance needs the expert group of every sequence")
        experts = jnp.arange(sequences.weights.shape[-1], dtype=jnp.float32)
        group = jnp.floor_divide(experts * self.num_groups, statistics.num_experts)
        is_own = sequences.group[:, None] == group[None]
        z = sequences.weights * jnp.where(is_own, 1.0 + self.delta, 1.0 - self.delta)
        counted = sequences.real[:, None] * statistics.present[None]
        count = jnp.maximum(jnp.sum(counted), 1.0)
        mean = jnp.sum(counted * z) / count
        variance = jnp.sum(counted * jnp.square(z - mean)) / count
        # Without tokens everything is zero; the gradient divides by the square of this floor.
        return variance / jnp.maximum(jnp.square(mean), 1e-12)
