"""Switch: one expert for every token, and a limit to how many tokens an expert serves."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.adapters.router import ROUTERS, Router, Routing
from moe_jax.config.parse import require

_LARGEST_DENOMINATOR = 1000
"""Of a capacity factor as a fraction; keeps its product with a row's length within int32."""


@ROUTERS.register("switch")
@dataclass(frozen=True, kw_only=True)
class SwitchRouter(Router):
    """The most probable expert, while it has capacity (arXiv:2101.03961, sections 2.1 and 2.2).

    Capacity is counted in each sequence by itself, that is in each row, from its start: a token is
    served if no more than `capacity` real tokens up to and including itself chose its expert.
    Padding neither takes capacity nor adds to it. Ties go to the expert of the lower index. The
    same rule holds while training and afterwards.

    `Routing.load` counts what tokens chose, before capacity, as the paper does for balance.

    Attributes:
      capacity: tokens that an expert serves in a sequence. Whether a token is served depends on
        the tokens before it alone.
      capacity_factor: instead, `ceil(capacity_factor * real tokens of the row / E)`, eq. 3 of the
        paper for each sequence. Whether a token is served then also depends on how many follow. In
        decoding nobody knows how many will: the prompt is decided on as a whole, and each token
        after it as the last one so far, once and for all; so a pass over the finished text, which
        has a larger capacity from the start, may serve tokens that decoding did not.
      overflow: what the FFN gives for a token that is not served. `residual`: zero, which leaves
        the token to the residual connection (the paper, transformers). `input`: the token's weight
        times the FFN's input (MoE-PEFT). `frozen`: the frozen FFN without an expert.
      weights: of the expert that serves the token. `probability`: its probability, so that even an
        untrained adapter scales the FFN's output. `straight_through`: one, with the gradient of the
        probability relative to its value; with `frozen`, an untrained adapter then leaves the base
        as it is.
      sparse_step: routes the layers l, from 0, with `l % sparse_step == 1`, or all with 1; the
        FFNs of the others stay frozen, and their part of the adapter's weights stays untrained.
    """

    limits_load = True

    capacity: int | None = None
    capacity_factor: float | None = None
    overflow: Literal["residual", "input", "frozen"] = "residual"
    weights: Literal["probability", "straight_through"] = "probability"
    sparse_step: int = 1

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.capacity is None) != (self.capacity_factor is None),
            "capacity",
            "give either capacity or capacity_factor, and None for the other",
        )
        require(self.capacity is None or self.capacity > 0, "capacity", "must be positive")
        require(
            self.capacity_factor is None or self.capacity_factor > 0.0,
            "capacity_factor",
            "must be positive",
        )
        require(self.sparse_step > 0, "sparse_step", "must be positive")

    def check_depth(self, num_layers: int) -> None:
        require(
            self.sparse_step == 1 or num_layers > 1,
            "sparse_step",
            f"{self.sparse_step} routes layer 1 first, counted from 0, but the model has "
            f"{num_layers} layer; use 1",
        )

    def routes_layer(self, layer_index: jax.Array) -> jax.Array | None:
        return None if self.sparse_step == 1 else layer_index % self.sparse_step == 1

    def route(self, router_logits: jax.Array, token_mask: jax.Array) -> Routing:
        rows, experts = router_logits.shape[0], router_logits.shape[-1]
        return self.route_on(router_logits, token_mask, jnp.zeros((rows, experts), jnp.int32))

    def route_on(
        self, router_logits: jax.Array, token_mask: jax.Array, earlier: jax.Array
    ) -> Routing:
        experts = router_logits.shape[-1]
        probs = jax.nn.softmax(router_logits, axis=-1)
        chosen = jax.nn.one_hot(jnp.argmax(probs, axis=-1), experts, dtype=jnp.int32)
        # How many real tokens up to each one chose its expert.
        counts = jnp.cumsum(chosen * token_mask[..., None], axis=1, dtype=jnp.int32)
        place = jnp.sum((counts + earlier[:, None]) * chosen, axis=-1)
        # Every token before chose one expert, so that these are all of them.
        tokens = jnp.sum(token_mask, axis=1, keepdims=True, dtype=jnp.int32)
        tokens = tokens + jnp.sum(earlier, axis=1, keepdims=True)
        served = (place <= self._capacities(tokens, experts)).astype(probs.dtype)

        weight = jnp.max(probs, axis=-1)
        if self.weights == "straight_through":
            weight = weight / jax.lax.stop_gradient(weight)
        load = chosen.astype(probs.dtype)
        overflow = 1.0 - served
        own_weight = {
            "residual": weight * served,
            "input": weight * served,
            "frozen": jnp.where(served == 1.0, weight, 1.0),
        }[self.overflow]
        return Routing(
            router_logits,
            probs,
            dispatch=(load * served[..., None])[..., None, :],
            weights=own_weight[..., None],
            load=load,
            bypass=weight * overflow if self.overflow == "input" else None,
            overflow=overflow,
        )

    def _capacities(self, tokens: jax.Array, experts: int) -> jax.Array | int:
        """The capacity of an expert in rows of so many real tokens, int32 [B, 1]."""
        if self.capacity_factor is None:
            assert self.capacity is not None
            return self.capacity
        # In integers: a product that floats leave just above a whole number would be rounded up.
        factor = Fraction(str(self.capacity_factor)).limit_denominator(_LARGEST_DENOMINATOR)
        divisor = factor.denominator * experts
        capacities = (factor.numerator * tokens + divisor - 1) // divisor
        return jnp.maximum(capacities, 1)  # a factor that has no such fraction but zero
