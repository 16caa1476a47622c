"""Routers: from a token's hidden state to the experts that serve it, and their weights."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.lora import adapter_leaf
from moe_jax.sharding.axes import EMBED, EXPERTS


class Routing(NamedTuple):
    """The decision of a router for every token; float32.

    Attributes:
      router_logits: [B, S, E].
      router_probs: [B, S, E], softmax of the logits.
      dispatch: [B, S, C, E], one-hot over E: which expert fills slot C.
      weights: [B, S, C], the slot's share of the output.
    """

    router_logits: jax.Array
    router_probs: jax.Array
    dispatch: jax.Array
    weights: jax.Array


def top_k_routing(router_logits: jax.Array, top_k: int) -> Routing:
    """The k most probable experts, their probabilities renormalised to sum to one.

    MixLoRA (arXiv:2404.15159, eq. 5) and Mixtral (arXiv:2401.04088, section 2.1); the order of
    softmax and top-k does not matter once the weights are renormalised.

    Args:
      router_logits: float32 [B, S, E].
      top_k: C, at most E. Ties go to the expert of the lower index.
    """
    probs = jax.nn.softmax(router_logits, axis=-1)
    weights, experts = jax.lax.top_k(probs, top_k)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    dispatch = jax.nn.one_hot(experts, router_logits.shape[-1], dtype=probs.dtype)
    return Routing(router_logits, probs, dispatch, weights)


class Router(nn.Module):
    """A linear layer over the hidden state, in float32 whatever the model computes in.

    Attributes:
      num_experts: E.
      init_std: standard deviation of the initial kernel.
      jitter_noise: while training, the router's own view of its input is multiplied by uniform
        noise in [1 - jitter_noise, 1 + jitter_noise] (arXiv:2101.03961, section 2.2); the experts
        see the input as it is.

    Leaf: `kernel` [D, E].
    """

    num_experts: int
    init_std: float
    jitter_noise: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Router logits, float32 [B, S, E], of x [B, S, D]."""
        init = nn.initializers.normal(self.init_std)
        kernel = adapter_leaf(
            self, "kernel", init, (x.shape[-1], self.num_experts), (EMBED, EXPERTS)
        )
        x = x.astype(jnp.float32)
        if self.jitter_noise > 0.0 and not deterministic:
            low, high = 1.0 - self.jitter_noise, 1.0 + self.jitter_noise
            x = x * jax.random.uniform(self.make_rng("dropout"), x.shape, x.dtype, low, high)
        return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)
