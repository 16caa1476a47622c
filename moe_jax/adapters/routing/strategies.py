"""Soft routing: every expert serves every token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.adapters.routing.router import ROUTERS, Router, Routing
from moe_jax.config.parse import require


@ROUTERS.register("soft")
@dataclass(frozen=True, kw_only=True)
class SoftRouter(Router):
    """All experts, weighted by the router's probabilities.

    The mixture of experts of Jacobs et al. (1991), all of them at work. The weights sum to one, so
    that an untrained adapter leaves the base as it is. An expert's load is its weight.

    It costs E hidden activations a token, against k of top-k, but no more matrix products than one
    pair of rank E R does.
    """

    def route(
        self,
        router_logits: jax.Array,
        token_mask: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        earlier: jax.Array | None = None,
    ) -> Routing:
        probs = jax.nn.softmax(router_logits, axis=-1)
        return Routing(router_logits, probs, None, probs, probs)


# FIXME docstring of the merged adapters.routing.top_k:
# """Top-k: a fixed number of experts for every token."""


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

    def route(
        self,
        router_logits: jax.Array,
        token_mask: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        earlier: jax.Array | None = None,
    ) -> Routing:
        probs = jax.nn.softmax(router_logits, axis=-1)
        weights, experts = jax.lax.top_k(probs, self.top_k)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        dispatch = jax.nn.one_hot(experts, router_logits.shape[-1], dtype=probs.dtype)
        return Routing(router_logits, probs, dispatch, weights, jnp.sum(dispatch, axis=-2))


# FIXME docstring of the merged adapters.routing.top_p:
# """Top-p: as many experts as a token needs to collect a given share of probability."""


@ROUTERS.register("top_p")
@dataclass(frozen=True, kw_only=True)
class TopPRouter(Router):
    """The most probable experts, in order, until their probabilities add up to more than `top_p`.

    Dynamic routing (arXiv:2403.07652): the smallest set whose probabilities exceed `top_p`. That
    is, with probabilities v_1 >= v_2 >= ..., the expert of rank j serves the token if
    v_1 + ... + v_(j-1) <= top_p: the expert that crosses `top_p` is included, the first always is,
    and one that lands on `top_p` does not cross it. Ties go to the expert of the lower index.

    Attributes:
      top_p: in (0, 1]; 1 keeps all experts.
      temperature: the logits are divided by it, here and for all losses: above 1 more experts
        serve a token, below 1 fewer.
      renormalise: divides the weights by their sum, so that an untrained adapter leaves the base as
        it is. Without, they are the probabilities themselves, and what the experts that were not
        chosen would have got is missing from a MixLoRA's FFN output, but not elsewhere.
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
    ) -> Routing:
        router_logits = router_logits / self.temperature
        probs = jax.nn.softmax(router_logits, axis=-1)
        kept = (_mass_before(probs) <= self.top_p).astype(probs.dtype)
        weights = probs * kept
        if self.renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return Routing(router_logits, probs, None, weights, kept)


def _mass_before(probs: jax.Array) -> jax.Array:
    """What the experts before each expert, in order of probability, have together; as `probs`.

    E^2 comparisons a token instead of a sort there and back. Each sum has the same E terms, some of
    them zero, in the same order, so that rounding cannot put one out of order.

    Args:
      probs: [..., E].
    """
    index = jnp.arange(probs.shape[-1])
    own, other = probs[..., :, None], probs[..., None, :]
    before = (other > own) | ((other == own) & (index[None, :] < index[:, None]))
    mass = jnp.sum(jnp.where(before, other, 0.0), axis=-1)
    return jnp.minimum(mass, 1.0)  # which rounding may exceed, and `top_p` 1 keeps every expert
