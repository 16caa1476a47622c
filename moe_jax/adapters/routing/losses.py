"""Auxiliary losses of routers, from the statistics that the layers sowed.

Every loss is a frozen dataclass, its configuration, that computes a scalar from the statistics of
one layer; `over_layers` applies it to each layer and averages, or to the sum of all layers. To add
one, derive it from `RouterLoss` and decorate it with `@ROUTER_LOSSES.register("its_name")`.
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
from moe_jax.config.parse import Registry, require, within

ROUTER_LOSSES = Registry("loss")
"""The losses by the name that a configuration gives: `losses.NAME`, or the field `name` there."""


@dataclass(frozen=True, kw_only=True)
class RouterLoss(abc.ABC):
    """What all losses share.

    Attributes:
      coefficient: its weight in the total loss.
      scope: `per_layer` takes the loss of each layer and averages over the layers that route;
        `pooled` first adds up the statistics of all layers, as transformers does, and is blind to
        layers that collapse onto different experts.
    """

    registry: ClassVar[Registry] = ROUTER_LOSSES

    coefficient: float
    scope: Literal["per_layer", "pooled"] = "per_layer"

    def __post_init__(self):
        require(self.coefficient >= 0, "coefficient", "must not be negative")

    @property
    def by_sequence(self) -> bool:
        """Whether the loss reads `RouterStatistics.sequences`, which are left out otherwise."""
        return False

    def check(self, num_experts: int) -> None:  # noqa: B027  optional
        """Refuses, with `require`, settings that do not go with so many experts."""

    def check_expert_groups(self, groups: Mapping[str, int]) -> None:  # noqa: B027  optional
        """Refuses, with `require`, expert groups of the training data sets that do not fit.

        Args:
          groups: `SourceConfig.expert_group` of each training data set, by name.
        """

    @abc.abstractmethod
    def of_layer(self, statistics: RouterStatistics) -> jax.Array:
        """The loss of one layer, without its coefficient; a float32 scalar."""

    def over_layers(self, statistics: RouterStatistics) -> jax.Array:
        """The loss over all layers of one site, without its coefficient.

        Args:
          statistics: with a leading axis L on each field.
        """
        if self.scope == "pooled":
            return self.of_layer(statistics.pooled())
        losses = jax.vmap(self.of_layer)(statistics)
        routed = statistics.routed.astype(jnp.float32)
        return jnp.sum(losses * routed) / jnp.maximum(jnp.sum(routed), 1.0)


def check_losses(losses: Mapping[str, RouterLoss], num_experts: int) -> None:
    """Refuses, with `require`, losses in the field `losses` that so many experts do not go with.

    Also names that other metrics of an adapter have, or that would be taken apart.
    """
    for name, loss in losses.items():
        require(
            name not in METRICS and re.fullmatch(r"\w+", name) is not None,
            f"losses.{name}",
            "is the name of another metric, or holds more than letters, digits and '_'; give the "
            "loss another one, and its kind in the field 'name'",
        )
        with within(f"losses.{name}"):
            loss.check(num_experts)


@ROUTER_LOSSES.register("load_balance")
@dataclass(frozen=True, kw_only=True)
class LoadBalance(RouterLoss):
    """E * sum_e f_e P_e: the load's product with the mean probability.

    Switch Transformer (arXiv:2101.03961, eqs. 4 to 6), for k slots as in Mixtral: f_e counts every
    slot, so that perfect balance gives k and full collapse onto k experts gives up to E.
    """

    def of_layer(self, statistics: RouterStatistics) -> jax.Array:
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

    def of_layer(self, statistics: RouterStatistics) -> jax.Array:
        importance, present = statistics.weight_sum, statistics.present
        mean = jnp.sum(importance * present) / statistics.num_experts
        variance = jnp.sum(present * jnp.square(importance - mean)) / statistics.num_experts
        # All is zero without tokens. The floor's square, which the gradient divides by, is not.
        return variance / jnp.maximum(jnp.square(mean), 1e-12)


@ROUTER_LOSSES.register("router_z")
@dataclass(frozen=True, kw_only=True)
class RouterZ(RouterLoss):
    """Mean squared log-partition function of the logits; ST-MoE (arXiv:2202.08906, eq. 5)."""

    def of_layer(self, statistics: RouterStatistics) -> jax.Array:
        return statistics.squared_logsumexp_sum / jnp.maximum(statistics.tokens, 1.0)


@ROUTER_LOSSES.register("router_entropy")
@dataclass(frozen=True, kw_only=True)
class RouterEntropy(RouterLoss):
    """Mean entropy of the router's distributions, in nats; minimising it makes decisions firm.

    With top-p it keeps the number of experts small (arXiv:2403.07652).
    """

    def of_layer(self, statistics: RouterStatistics) -> jax.Array:
        return statistics.entropy_sum / jnp.maximum(statistics.tokens, 1.0)


# FIXME docstring of the merged adapters.localized_balance:
# """LoRAMoE's localized balancing constraint: an auxiliary loss that knows the kinds of data."""


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
