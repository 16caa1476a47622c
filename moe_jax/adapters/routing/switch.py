"""Switch routing: one expert per token, each with a limited capacity."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.adapters.routing.router import ROUTERS, Router, Routing
from moe_jax.config.parse import require
from moe_jax.layers.tokens import sequence_bounds

_LARGEST_DENOMINATOR = 1000
"""Bound of a capacity factor as a fraction; keeps its product with a row length within int32."""


@ROUTERS.register("switch")
@dataclass(frozen=True, kw_only=True)
class SwitchRouter(Router):
    """The most probable expert while it has capacity (arXiv:2101.03961, sections 2.1 and 2.2).

    Capacity is counted within each sequence, from its start: a token is served if at most
    `capacity` real tokens up to and including it chose its expert. Padding and other sequences of
    the row neither use capacity nor add to it. Ties go to the expert with the lower index. The same
    rule holds in training and in inference.

    `Routing.load` counts the tokens' choices before capacity, as the paper does for balance.

    Attributes:
      capacity: number of tokens that an expert serves in a sequence. A token's routing then depends
        on earlier tokens only.
      capacity_factor: sets the capacity to `ceil(capacity_factor * real tokens of the sequence /
        E)` instead, eq. 3 of the paper for each sequence. A token's routing then also depends on
        the number of later tokens. Decoding does not know that number: it routes the prompt as a
        whole, and each new token as the last one so far. A pass over the finished text has a larger
        capacity from the start and may serve tokens that decoding did not.
      overflow: output of the FFN for a token that is not served. `residual`: zero, which leaves the
        token to the residual connection (the paper, transformers). `input`: the FFN's input times
        the token's weight (MoE-PEFT). `frozen`: the frozen FFN without an expert.
      weights: weight of the expert. `probability`: its probability, so that even an untrained
        adapter scales the FFN's output. `straight_through`: one, with the gradient of the
        probability divided by its value; together with `frozen`, an untrained adapter then equals
        the base model.
      sparse_step: routes the layers l, counted from 0, with `l % sparse_step == 1`; with 1 all
        layers. The other FFNs stay frozen, and their part of the adapter stays untrained.
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
        prompt_length: jax.Array | None = None,
    ) -> Routing:
        chosen, counts = _choices(router_logits, token_mask)
        if segment_ids is None:
            tokens = jnp.sum(token_mask, axis=1, keepdims=True, dtype=jnp.int32)
            if earlier is not None:  # each earlier token chose one expert: the sum counts all
                tokens = tokens + jnp.sum(earlier, axis=1, keepdims=True)
                counts = counts + earlier[:, None]
            if prompt_length is not None:
                tokens = prompt_length[:, None]
            return self._serve(router_logits, chosen, counts, tokens)
        first, last = (bound[..., None] for bound in sequence_bounds(segment_ids))
        # Counts of the row before the sequence; in integers, so that nothing is lost to rounding.
        real_choices = chosen * token_mask[..., None].astype(chosen.dtype)
        at_first = jnp.take_along_axis(real_choices, first, axis=1)
        before = jnp.take_along_axis(counts, first, axis=1) - at_first
        tokens = jnp.sum(jnp.take_along_axis(counts, last, axis=1) - before, axis=-1)
        return self._serve(router_logits, chosen, counts - before, tokens)

    def _serve(
        self, router_logits: jax.Array, chosen: jax.Array, counts: jax.Array, tokens: jax.Array
    ) -> Routing:
        """Routing in which tokens beyond an expert's capacity overflow.

        Args:
          router_logits: float32 [B, S, E].
          chosen: int32 [B, S, E], one-hot.
          counts: int32 [B, S, E], number of real tokens of a token's sequence, up to and including
            it, that chose each expert.
          tokens: int32 [B, S] or [B, 1], number of real tokens of its sequence.
        """
        experts = router_logits.shape[-1]
        probs = jax.nn.softmax(router_logits, axis=-1)
        rank = jnp.sum(counts * chosen, axis=-1)  # of the token among those of its expert
        served = (rank <= self._capacities(tokens, experts)).astype(probs.dtype)

        weight = jnp.max(probs, axis=-1)
        if self.weights == "straight_through":
            weight = weight / jax.lax.stop_gradient(weight)
        load = chosen.astype(probs.dtype)
        overflow = 1.0 - served
        slot_weight = {
            "residual": weight * served,
            "input": weight * served,
            "frozen": jnp.where(served == 1.0, weight, 1.0),
        }[self.overflow]
        return Routing(
            router_logits,
            probs,
            dispatch=(load * served[..., None])[..., None, :],
            weights=slot_weight[..., None],
            load=load,
            bypass=weight * overflow if self.overflow == "input" else None,
            overflow=overflow,
        )

    def _capacities(self, tokens: jax.Array, experts: int) -> jax.Array | int:
        """Capacity of an expert in sequences of `tokens` real tokens, shaped as `tokens`."""
        if self.capacity_factor is None:
            assert self.capacity is not None
            return self.capacity
        # In integers: a float product just above a whole number would be rounded up.
        factor = Fraction(str(self.capacity_factor)).limit_denominator(_LARGEST_DENOMINATOR)
        divisor = factor.denominator * experts
        capacities = (factor.numerator * tokens + divisor - 1) // divisor
        return jnp.maximum(capacities, 1)  # a factor whose nearest fraction is zero


def _choices(router_logits: jax.Array, token_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One-hot choices, and running counts of the real tokens of a row that chose each expert.

    Returns:
      Two int32 [B, S, E].
    """
    experts = router_logits.shape[-1]
    best = jnp.argmax(jax.nn.softmax(router_logits, axis=-1), axis=-1)
    chosen = jax.nn.one_hot(best, experts, dtype=jnp.int32)
    counted = chosen * token_mask[..., None].astype(jnp.int32)
    return chosen, jnp.cumsum(counted, axis=1)
