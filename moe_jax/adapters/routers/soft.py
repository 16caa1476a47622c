"""Soft routing: every expert serves every token."""

from dataclasses import dataclass

import jax

from moe_jax.adapters.router import ROUTERS, Router, Routing


@ROUTERS.register("soft")
@dataclass(frozen=True, kw_only=True)
class SoftRouter(Router):
    """All experts, weighted by the router's probabilities.

    The mixture of experts of Jacobs et al. (1991), all of them at work. The weights sum to one, so
    that an untrained adapter leaves the base as it is. An expert's load is its weight.

    It costs E hidden activations a token, against k of top-k, but no more matrix products than one
    pair of rank E R does.
    """

    def route(self, router_logits: jax.Array, token_mask: jax.Array) -> Routing:
        probs = jax.nn.softmax(router_logits, axis=-1)
        return Routing(router_logits, probs, None, probs, probs)
