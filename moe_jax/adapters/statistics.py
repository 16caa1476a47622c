"""What a routed layer reports of its decisions: sums over tokens, from which losses are computed.

Sums, not means: they add up over devices and layers, and nothing is divided before the number of
real tokens is known.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from moe_jax.adapters.routers import Routing
from moe_jax.adapters.sites import by_adapter
from moe_jax.layers.collections import ROUTER

STATISTICS = "statistics"


class RouterStatistics(NamedTuple):
    """Sums over the real tokens of one layer, float32; padding is not in them.

    Under the scan over layers each field has a leading axis L.

    Attributes:
      tokens: [], number of tokens.
      slot_counts: [C, E], tokens whose slot C went to expert E. Carries no gradient.
      probability_sum: [E], sum of router probabilities.
      weight_sum: [E], sum of the weights that the chosen experts got.
      squared_logsumexp_sum: [], sum of squared log-partition functions of the router logits.
      entropy_sum: [], sum of the router distributions' entropies in nats.
    """

    tokens: jax.Array
    slot_counts: jax.Array
    probability_sum: jax.Array
    weight_sum: jax.Array
    squared_logsumexp_sum: jax.Array
    entropy_sum: jax.Array


def router_statistics(routing: Routing, token_mask: jax.Array) -> RouterStatistics:
    """Statistics of one layer.

    Args:
      routing: the router's decision.
      token_mask: bool [B, S], false at padding.
    """
    mask = token_mask.astype(jnp.float32)
    log_probs = jax.nn.log_softmax(routing.router_logits, axis=-1)
    entropy = -jnp.sum(routing.router_probs * log_probs, axis=-1)
    logsumexp = jax.nn.logsumexp(routing.router_logits, axis=-1)
    return RouterStatistics(
        tokens=jnp.sum(mask),
        slot_counts=jax.lax.stop_gradient(jnp.einsum("bs,bsce->ce", mask, routing.dispatch)),
        probability_sum=jnp.einsum("bs,bse->e", mask, routing.router_probs),
        weight_sum=jnp.einsum("bs,bsc,bsce->e", mask, routing.weights, routing.dispatch),
        squared_logsumexp_sum=jnp.sum(mask * jnp.square(logsumexp)),
        entropy_sum=jnp.sum(mask * entropy),
    )


def sow_statistics(module: nn.Module, statistics: RouterStatistics) -> None:
    """Puts the statistics into the `router` collection, replacing Linen's default of a tuple."""
    nothing: Any = None
    last = lambda _, new: new
    module.sow(ROUTER, STATISTICS, statistics, reduce_fn=last, init_fn=lambda: nothing)


def collect_statistics(sown: Mapping[str, Any]) -> dict[str, list[RouterStatistics]]:
    """The statistics of each adapter, one entry per site, each with a leading axis L.

    Args:
      sown: the variables that `apply(..., mutable=["router"])` returned.

    Raises:
      ValueError: the collection is missing. Sowing is silent where a collection is not mutable, so
        its absence is a defect of the caller and never means "no routers".
    """
    if ROUTER not in sown:
        raise ValueError(f"no {ROUTER!r} collection was sown; apply the model with it mutable")
    trees = by_adapter(sown[ROUTER])
    return {name: _leaves(tree) for name, tree in trees.items()}


def _leaves(tree: Any) -> list[Any]:
    return list(flatten_dict(tree).values())
