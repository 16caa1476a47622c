"""Routing strategies without a limit on the load: soft, top-k and top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.adapters.routing.router import ROUTERS, Router, Routing
from moe_jax.config.parse import require


@ROUTERS.register("soft")
@dataclass(frozen=True, kw_only=True)
class SoftRouter(Router):
    """All experts, weighted by the router's probabilities (Jacobs et al., 1991).

    The weights sum to one, so that an untrained adapter equals the base model. The load of an
    expert is its weight. A token costs E hidden activations, against k with top-k, but no more
    matrix products than one pair of rank E R.
    """

    def route(
        self,
        router_logits: jax.Array,
        token_mask: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        earlier: jax.Array | None = None,
        prompt_length: jax.Array | None = None,
    ) -> Routing:
        probs = jax.nn.softmax(router_logits, axis=-1)
        return Routing(router_logits, probs, None, probs, probs)


@ROUTERS.register("top_k")
@dataclass(frozen=True, kw_only=True)
class TopKRouter(Router):
    """The k most probable experts, their probabilities renormalized to sum to one.

    MixLoRA (arXiv:2404.15159, eq. 5) and Mixtral (arXiv:2401.04088, section 2.1). With
    renormalized weights, the order of softmax and top-k does not matter. Ties go to the expert with
    the lower index.

    Attributes:
      top_k: number of experts per token, C; at most E.
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

    def route(
        self,
        router_logits: jax.Array,
        token_mask: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        earlier: jax.Array | None = None,
        prompt_length: jax.Array | None = None,
    ) -> Routing:
        probs = jax.nn.softmax(router_logits, axis=-1)
        weights, experts = jax.lax.top_k(probs, self.top_k)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        dispatch = jax.nn.one_hot(experts, router_logits.shape[-1], dtype=probs.dtype)
        return Routing(router_logits, probs, dispatch, weights, jnp.sum(dispatch, axis=-2))


@ROUTERS.register("top_p")
@dataclass(frozen=True, kw_only=True)
class TopPRouter(Router):
    """The smallest set of experts whose probabilities add up to more than `top_p`.

    Dynamic routing (arXiv:2403.07652). With probabilities v_1 >= v_2 >= ..., the expert of rank j
    is selected if v_1 + ... + v_(j-1) <= top_p: the first always is, and so is the one that crosses
    `top_p`. Ties go to the expert with the lower index.

    Attributes:
      top_p: threshold in (0, 1]; 1 selects all experts.
      temperature: divisor of the logits, here and in all losses. Above 1 it selects more experts,
        below 1 fewer.
      renormalise: divides the weights by their sum, so that an untrained adapter equals the base
        model. Otherwise the weights are the probabilities, and the output of a MixLoRA FFN lacks
        the share of the experts that were not selected.
    """

    top_p: float
    temperature: float = 1.0
    renormalise: bool = True

    def __post_init__(self):
        super().__post_init__()
        require(0.0 < self.top_p <= 1.0, "top_p", "must lie in (0, 1]")
        require(self.temperature > 0.0, "temperature", "must be positive")

    def route(
        self,
        router_logits: jax.Array,
        token_mask: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        earlier: jax.Array | None = None,
        prompt_length: jax.Array | None = None,
    ) -> Routing:
        router_logits = router_logits / self.temperature
        probs = jax.nn.softmax(router_logits, axis=-1)
        kept = (_mass_before(probs) <= self.top_p).astype(probs.dtype)
        weights = probs * kept
        if self.renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(router_logits, probs, None, weights, kept)


def _mass_before(probs: jax.Array) -> jax.Array:
    """Summed probability of all more probable experts, for each expert; shaped as `probs`.

    Takes E^2 comparisons per token instead of two sorts. Each sum has the same E terms in the same
    order, some of them zero, so that rounding cannot change the order of the sums.

    Args:
      probs: [..., E].
    """
    index = jnp.arange(probs.shape[-1])
    p_i, p_j = probs[..., :, None], probs[..., None, :]
    ties = p_j == p_i
    ranks_higher = (p_j > p_i) | (ties & jnp.broadcast_to(index[None] < index[:, None], ties.shape))
    mass = jnp.sum(jnp.where(ranks_higher, p_j, 0.0), axis=-1)
    return jnp.minimum(mass, 1.0)  # rounding may exceed 1, and `top_p` 1 selects every expert
