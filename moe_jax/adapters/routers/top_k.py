"""Top-k: a fixed number of experts for every token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.adapters.router import ROUTERS, Router, Routing
from moe_jax.config.parse import require


@ROUTERS.register("top_k")
@dataclass(frozen=True, kw_only=True)
class TopKRouter(Router):
    """The k most probable experts, their probabilities renormalised to sum to one.

    MixLoRA (arXiv:2404.15159, eq. 5) and Mixtral (arXiv:2401.04088, section 2.1); the order of
    softmax and top-k does not matter once the weights are renormalised. Ties go to the expert of
    the lower index.

    Attributes:
      top_k: C, at most E.
    """

    top_k: int = 2

    def __post_init__(self):
        super().__post_init__()
        require(self.top_k > 0, "top_k", "must be positive")

    def check(self, num_experts: int) -> None:
        require(
            self.top_k <= num_experts,
            "top_k",
            f"{self.top_k} experts per token, but there are only {num_experts}",
        )

    def route(self, router_logits: jax.Array, token_mask: jax.Array) -> Routing:
        probs = jax.nn.softmax(router_logits, axis=-1)
        weights, experts = jax.lax.top_k(probs, self.top_k)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        dispatch = jax.nn.one_hot(experts, router_logits.shape[-1], dtype=probs.dtype)
        return Routing(router_logits, probs, dispatch, weights, jnp.sum(dispatch, axis=-2))
