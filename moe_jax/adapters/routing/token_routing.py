"""What a router decided for every token: for looking at, never for training.

The statistics of `moe_jax.adapters.routing.statistics` are sums, made in every step. These are the tokens'
own numbers, [B, S, E] of each layer, and are made only where a caller asks for the collection:
otherwise nothing of this is traced.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from moe_jax.adapters.routing.router import Routing
from moe_jax.adapters.tree import by_adapter
from moe_jax.layers.names import ROUTING

TOKENS = "tokens"


class TokenRouting(NamedTuple):
    """The decisions of one layer's router, float32; zero at padding and in a layer left frozen.

    Under the scan over layers each field has a leading axis L.

    Attributes:
      weights: [B, S, E], each expert's share of the token's output.
      probabilities: [B, S, E], the router's own, before experts are chosen.
      load: [B, S, E], see `Routing.load`: 1 for a chosen expert, the weight where all share.
      routed: [], 1 if the layer routes, 0 if it was left frozen.
      present: [E], 1 for the experts that the layer has.
    """

    weights: jax.Array
    probabilities: jax.Array
    load: jax.Array
    routed: jax.Array
    present: jax.Array


def sow_routing(
    module: nn.Module,
    routing: Routing,
    token_mask: jax.Array,
    *,
    routed: jax.Array | None = None,
    present: jax.Array | None = None,
) -> None:
    """Puts the decisions into the `routing` collection if the caller made it mutable.

    Args:
      module: that routes.
      routing: its decision.
      token_mask: bool [B, S], false at padding.
      routed: bool [], false if the layer is left frozen; None stands for true.
      present: bool [E], the experts that the layer has; None stands for all.
    """
    if module.is_initializing() or not module.is_mutable_collection(ROUTING):
        return
    experts = routing.router_logits.shape[-1]
    routed = jnp.ones((), jnp.float32) if routed is None else routed.astype(jnp.float32)
    present = jnp.ones(experts) if present is None else present.astype(jnp.float32)
    mask = (token_mask.astype(jnp.float32) * routed)[..., None]
    tokens = TokenRouting(
        weights=mask * routing.combine,
        probabilities=mask * routing.router_probs,
        load=mask * routing.load * present,
        routed=routed,
        present=present,
    )
    nothing: Any = None
    last = lambda _, new: new
    module.sow(ROUTING, TOKENS, tokens, reduce_fn=last, init_fn=lambda: nothing)


def collect_routing(sown: Mapping[str, Any]) -> dict[str, dict[str, TokenRouting]]:
    """The decisions of each adapter, `{adapter: {site: decisions}}`, each with a leading axis L.

    Args:
      sown: the variables that `apply(..., mutable=["routing"])` returned.

    Raises:
      ValueError: the collection is missing. Sowing is silent where a collection is not mutable, so
        its absence is a defect of the caller or of a method, and never means "no routers".
    """
    if ROUTING not in sown:
        raise ValueError(f"no {ROUTING!r} collection was sown; apply the model with it mutable")
    collected: dict[str, dict[str, TokenRouting]] = {}
    for name, tree in by_adapter(sown[ROUTING]).items():
        leaves: Any = flatten_dict(tree)
        for path, tokens in leaves.items():
            site = "/".join(part for part in path if part not in ("layers", TOKENS))
            collected.setdefault(name, {})[site] = tokens
    return collected
