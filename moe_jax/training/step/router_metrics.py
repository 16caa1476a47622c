"""Metrics of an adapter's routers."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from moe_jax.adapters.routing.statistics import RouterStatistics


def routing_summary(sites: Mapping[str, RouterStatistics]) -> dict[str, jax.Array]:
    """Load of the experts, entropy of the routers and effective experts, by site and layer.

    - `expert_load` [sites * L, E]: load of each expert as a multiple of an equal share. 1 is ideal,
      0 a dead expert, NaN an expert that the layer does not have or does not route to.
    - `layer_entropy` [sites * L]: mean entropy of the routing distribution, divided by that of a
      uniform one; from 0 to 1.
    - `mean_entropy`, `busiest_expert` and `dead_experts`: over all layers that route, the mean
      entropy, the largest load and the number of experts that no token chose.
    - `layer_effective_experts` [sites * L]: mean effective number of experts of the tokens with an
      expert; from 1, one expert has all the weight, to the number of experts of a token, all of
      equal weight; 0 without such tokens. See `statistics.effective_experts`.
    - `effective_experts`: its mean over all layers with such tokens.
    - `layer_overflow` [sites * L] and `overflow`, for experts of limited capacity only: share of
      tokens whose expert was full, by layer and over all layers.

    Args:
      sites: statistics by site, with a leading axis L on each field.
    """
    layers = jax.tree.map(lambda *fields: jnp.concatenate(fields), *sites.values())
    load = layers.load_sum * layers.num_experts[:, None]
    load = load / jnp.maximum(jnp.sum(layers.load_sum, axis=-1, keepdims=True), 1e-9)
    is_active = layers.present * layers.routed[:, None]
    entropy = layers.entropy_sum / jnp.maximum(layers.tokens, 1.0) / jnp.log(layers.num_experts)
    effective = layers.effective_sum / jnp.maximum(layers.weighted_tokens, 1.0)
    effective_layers = jnp.sum(effective > 0, dtype=jnp.float32)
    dead = jnp.where(layers.load_sum == 0, is_active, 0.0)
    overflow = {}
    if layers.overflow_sum is not None:
        overflow["layer_overflow"] = layers.overflow_sum / jnp.maximum(layers.tokens, 1.0)
        tokens = jnp.maximum(jnp.sum(layers.tokens), 1.0)
        overflow["overflow"] = jnp.sum(layers.overflow_sum) / tokens
    return {
        "expert_load": jnp.where(is_active > 0, load, jnp.nan),
        "layer_entropy": entropy,
        "mean_entropy": jnp.sum(entropy) / jnp.maximum(jnp.sum(layers.routed), 1.0),
        "busiest_expert": jnp.max(load),
        "dead_experts": jnp.sum(dead),
        "layer_effective_experts": effective,
        "effective_experts": jnp.sum(effective) / jnp.maximum(effective_layers, 1.0),
        **overflow,
    }


def row_locations(sites: Sequence[str], rows: int) -> list[tuple[str, int]]:
    """Site and layer of each row of a metric [sites * L, ...] of `routing_summary`.

    Args:
      sites: sites in the order of `routing_summary`.
      rows: number of rows of the metric.
    """
    layers = rows // len(sites)
    return [(site, layer) for site in sites for layer in range(layers)]
