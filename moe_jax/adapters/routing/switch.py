"""Switch: one expert for every token, and a limit to how many tokens an expert serves."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.adapters.routing.router import ROUTERS, Router, Routing
from moe_jax.config.parse import require
from moe_jax.layers.tokens import sequence_bounds

_LARGEST_DENOMINATOR = 1000
"""Of a capacity factor as a fraction; keeps its product with a row's length within int32."""


@ROUTERS.register("switch")
@dataclass(frozen=True, kw_only=True)
class SwitchRouter(Router):
    """The most probable expert, while it has capacity (arXiv:2101.03961, sections 2.1 and 2.2).

    Capacity is counted in each sequence by itself, from its start: a token is served if no more
    than `capacity` real tokens up to and including itself chose its expert. Padding neither takes
    capacity nor adds to it, nor do other sequences in the row. Ties go to the expert of the lower
    index. The same rule holds while training and afterwards.

    `Routing.load` counts what tokens chose, before capacity, as the paper does for balance.

    Attributes:
      capacity: tokens that an expert serves in a sequence. Whether a token is served depends on
        the tokens before it alone.
      capacity_factor: instead, `ceil(capacity_factor * real tokens of the sequence / E)`, eq. 3
        of the paper for each sequence. Whether a token is served then also depends on how many
        follow. In decoding nobody knows how many will: the prompt is decided on as a whole, and
        each token after it as the last one so far, once and for all; so a pass over the finished
        text, which has a larger capacity from the start, may serve tokens that decoding did not.
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

    def route(
        self,
        router_logits: jax.Array,
        token_mask: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        earlier: jax.Array | None = None,
    ) -> Routing:
        chosen, counts = _choices(router_logits, token_mask)
        if segment_ids is None:
            tokens = jnp.sum(token_mask, axis=1, keepdims=True, dtype=jnp.int32)
            if earlier is not None:  # each earlier token chose one expert: the sum counts all
                tokens = tokens + jnp.sum(earlier, axis=1, keepdims=True)
                counts = counts + earlier[:, None]
            return self._serve(router_logits, chosen, counts, tokens)
        first, last = (bound[..., None] for bound in sequence_bounds(segment_ids))
        # Counts of the row before the sequence; in integers, so that nothing is lost to rounding.
        at_first = jnp.take_along_axis(chosen * token_mask[..., None], first, axis=1)
        before = jnp.take_along_axis(counts, first, axis=1) - at_first
        tokens = jnp.sum(jnp.take_along_axis(counts, last, axis=1) - before, axis=-1)
        return self._serve(router_logits, chosen, counts - before, tokens)

    def _serve(
        self, router_logits: jax.Array, chosen: jax.Array, counts: jax.Array, tokens: jax.Array
    ) -> Routing:
        """Serves the tokens that find capacity.

        Args:
          router_logits: float32 [B, S, E].
          chosen: int32 [B, S, E], one-hot.
          counts: int32 [B, S, E], how many real tokens of a token's sequence, up to it, chose each.
          tokens: int32 [B, S] or [B, 1], how many real tokens its sequence has.
        """
        experts = router_logits.shape[-1]
        probs = jax.nn.softmax(router_logits, axis=-1)
        place = jnp.sum(counts * chosen, axis=-1)
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
        """The capacity of an expert in sequences of so many real tokens, shaped as these."""
        if self.capacity_factor is None:
            assert self.capacity is not None
            return self.capacity
        # In integers: a product that floats leave just above a whole number would be rounded up.
        factor = Fraction(str(self.capacity_factor)).limit_denominator(_LARGEST_DENOMINATOR)
        divisor = factor.denominator * experts
        capacities = (factor.numerator * tokens + divisor - 1) // divisor
        return jnp.maximum(capacities, 1)  # a factor that has no such fraction but zero


def _choices(router_logits: jax.Array, token_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chosen experts, one-hot, and how many real tokens of the row up to each chose each.

    Returns:
      Two int32 [B, S, E].
    """
    experts = router_logits.shape[-1]
    best = jnp.argmax(jax.nn.softmax(router_logits, axis=-1), axis=-1)
    chosen = jax.nn.one_hot(best, experts, dtype=jnp.int32)
    return chosen, jnp.cumsum(chosen * token_mask[..., None], axis=1, dtype=jnp.int32)
