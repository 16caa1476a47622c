"""How many tokens of a row have chosen each expert: what a limited load needs while decoding."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.router import Router, Routing
from moe_jax.layers.kv_cache import cached, remember

_NAME = "expert_counts"


def route_and_count(
    module: nn.Module,
    router: Router,
    router_logits: jax.Array,
    token_mask: jax.Array,
    segment_ids: jax.Array | None,
) -> Routing:
    """Routes tokens behind those that the cache knows of, and counts them there.

    Args:
      module: that keeps the counts, int32 [B, E], in the collection `cache`.
      router: the strategy.
      router_logits: float32 [B, S, E].
      token_mask: bool [B, S], false at padding.
      segment_ids: int [B, S], see `AdapterContext`; rows that a cache is filled with are of one
        sequence each.
    """
    if not router.limits_load:
        return router.route(router_logits, token_mask)
    earlier = cached(module, _NAME)
    if earlier is not None:
        routing = router.route_on(router_logits, token_mask, earlier)
    elif segment_ids is not None:
        routing = router.route_packed(router_logits, token_mask, segment_ids)
    else:
        routing = router.route(router_logits, token_mask)
    # The load is what tokens chose, served or not.
    counts = jnp.sum(routing.load * token_mask[..., None], axis=1).astype(jnp.int32)
    remember(module, _NAME, counts if earlier is None else earlier + counts)
    return routing
