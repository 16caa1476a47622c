"""Auxiliary losses of routers, from the statistics that the layers sowed.

Every loss is a function of one layer's `RouterStatistics`; `router_loss` applies it to each layer
and averages, or to the sum of all layers. To add a loss, write the function and enter it below.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moe_jax.adapters.method import RouterLossConfig
from moe_jax.adapters.statistics import RouterStatistics
from moe_jax.config.parse import require, suggest


def load_balance(statistics: RouterStatistics) -> jax.Array:
    """E * sum_e f_e P_e: the load's product with the mean probability.

    Switch Transformer (arXiv:2101.03961, eqs. 4 to 6), for k slots as in Mixtral: f_e counts every
    slot, so that perfect balance gives k and full collapse onto k experts gives up to E.
    """
    tokens = jnp.maximum(statistics.tokens, 1.0)
    load = jnp.sum(statistics.slot_counts, axis=0) / tokens
    probability = statistics.probability_sum / tokens
    return load.shape[-1] * jnp.sum(load * probability)


def importance_cv(statistics: RouterStatistics) -> jax.Array:
    """Squared coefficient of variation of the experts' total weights, their importance.

    Shazeer et al. (arXiv:1701.06538, eqs. 6 and 7). 0 is balance; all weight on one of E experts
    gives E - 1.
    """
    importance = statistics.weight_sum
    mean = jnp.mean(importance)
    # Without tokens all is zero. The floor's square, which the gradient divides by, must not be.
    return jnp.mean(jnp.square(importance - mean)) / jnp.maximum(jnp.square(mean), 1e-12)


def router_z(statistics: RouterStatistics) -> jax.Array:
    """Mean squared log-partition function of the logits; ST-MoE (arXiv:2202.08906, eq. 5)."""
    return statistics.squared_logsumexp_sum / jnp.maximum(statistics.tokens, 1.0)


ROUTER_LOSSES: dict[str, Callable[[RouterStatistics], jax.Array]] = {
    "load_balance": load_balance,
    "importance_cv": importance_cv,
    "router_z": router_z,
}


def check_router_losses(losses: Mapping[str, RouterLossConfig]) -> None:
    """Refuses a loss that `ROUTER_LOSSES` does not have."""
    for name in losses:
        require(
            name in ROUTER_LOSSES, "losses", f"unknown {name!r}; {suggest(name, ROUTER_LOSSES)}"
        )


def router_loss(name: str, scope: str, layers: RouterStatistics) -> jax.Array:
    """The loss `name` over all layers, without its coefficient.

    Args:
      name: a key of `ROUTER_LOSSES`.
      scope: see `RouterLossConfig.scope`.
      layers: statistics with a leading axis L on each field.
    """
    loss = ROUTER_LOSSES[name]
    if scope == "pooled":
        return loss(jax.tree.map(lambda field: jnp.sum(field, axis=0), layers))
    return jnp.mean(jax.vmap(loss)(layers))
