"""What the routers of an adapter did, as metrics."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from moe_jax.adapters.routing.statistics import RouterStatistics


def routing_summary(sites: Mapping[str, RouterStatistics]) -> dict[str, jax.Array]:
    """What the routers did, site by site and layer by layer.

    `expert_load` [sites * L, E]: each expert's load as a multiple of an equal share; 1 is ideal, 0
    is a dead expert, NaN one that the layer does not have or does not route to. `layer_entropy`
    [sites * L]: mean entropy of the router's distribution over that of a uniform one, from 0 to 1.
    And scalars of the two, over all layers that route: `mean_entropy`, the mean; `busiest_expert`,
    the largest load; `dead_experts`, how many no token chose. Where experts have a limited capacity
    also `layer_overflow` [sites * L], the share of tokens whose expert had none left, and
    `overflow`, the same over all layers.

    Args:
      sites: with a leading axis L on each field.
    """
    layers = jax.tree.map(lambda *fields: jnp.concatenate(fields), *sites.values())
    load = layers.load_sum * layers.num_experts[:, None]
    load = load / jnp.maximum(jnp.sum(layers.load_sum, axis=-1, keepdims=True), 1e-9)
    there = layers.present * layers.routed[:, None]
    entropy = layers.entropy_sum / jnp.maximum(layers.tokens, 1.0) / jnp.log(layers.num_experts)
    dead = (layers.load_sum == 0) * there
    overflow = {}
    if layers.overflow_sum is not None:
        overflow["layer_overflow"] = layers.overflow_sum / jnp.maximum(layers.tokens, 1.0)
        tokens = jnp.maximum(jnp.sum(layers.tokens), 1.0)
        overflow["overflow"] = jnp.sum(layers.overflow_sum) / tokens
    return {
        "expert_load": jnp.where(there > 0, load, jnp.nan),
        "layer_entropy": entropy,
        "mean_entropy": jnp.sum(entropy) / jnp.maximum(jnp.sum(layers.routed), 1.0),
        "busiest_expert": jnp.max(load),
        "dead_experts": jnp.sum(dead),
        **overflow,
    }


def row_places(sites: Sequence[str], rows: int) -> list[tuple[str, int]]:
    """Site and layer of each row of a metric [sites * L, ...] of `routing_summary`.

    Args:
      sites: in the order in which they were summed up.
      rows: how many the metric has.
    """
    layers = rows // len(sites)
    return [(site, layer) for site in sites for layer in range(layers)]
