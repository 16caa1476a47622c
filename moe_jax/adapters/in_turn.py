"""Slots whose backward passes run one after another, over a few positions at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.layers.token_blocks import put_block, take_block

Slot = Callable[[int, Any, Any, Any], Any]
"""A slot: what it computes, a tree of arrays [B, S, ...], of its place and of `tokens`, `shared`
and `masks` as in `in_turn`."""


def in_turn(
    slot: Slot, count: int, tokens: Any, shared: Any, masks: Any, block: int
) -> tuple[Any, ...]:
    """What `slot(0, ...)`, `slot(1, ...)` and so on return, `count` of them.

    Nothing of a slot is kept for the backward pass but what it takes. There, block after block of
    positions is computed again, one slot after another, so that what a slot holds is held for one
    of them and for one block. (`jax.checkpoint` around each slot computes them again as well, but
    leaves XLA free to do so all at once, which it does.)

    Args:
      slot: treats all positions alike; it knows of no arrays besides those that it is given.
      count: of slots.
      tokens: a tree of float arrays [B, S, ...].
      shared: a tree of float arrays that all positions share.
      masks: a tree of arrays [B, S, ...] to which no gradient goes.
      block: positions that the backward pass takes at a time; a divisor of S.
    """

    @jax.custom_vjp
    def run(tokens: Any, shared: Any, masks: Any) -> tuple[Any, ...]:
        return tuple(slot(place, tokens, shared, masks) for place in range(count))

    def forward(tokens: Any, shared: Any, masks: Any) -> tuple[Any, Any]:
        return run(tokens, shared, masks), (tokens, shared, masks)

    def pull_back(
        tokens: Any, shared: Any, masks: Any, cotangents: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        """The gradients of tokens and of what they share, of all slots, of these positions."""
        total = None
        for place, cotangent in enumerate(cotangents):
            if total is not None:
                tokens, shared, cotangent, total = jax.lax.optimization_barrier(
                    (tokens, shared, cotangent, total)
                )

            def call(tokens: Any, shared: Any, place: int = place) -> Any:
                return slot(place, tokens, shared, masks)

            gradients = jax.vjp(call, tokens, shared)[1](cotangent)
            total = gradients if total is None else jax.tree.map(jnp.add, total, gradients)
        assert total is not None
        return total

    def backward(kept: Any, cotangents: tuple[Any, ...]) -> tuple[Any, Any, None]:
        tokens, shared, masks = kept
        length = jax.tree.leaves(tokens)[0].shape[1]
        if block == length:
            return *pull_back(tokens, shared, masks, cotangents), None

        def one_block(so_far: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], None]:
            own, own_masks, own_cotangents = take_block((tokens, masks, cotangents), number, block)
            of_tokens, of_shared = pull_back(own, shared, own_masks, own_cotangents)
            all_tokens = put_block(so_far[0], of_tokens, number, block)
            return (all_tokens, jax.tree.map(jnp.add, so_far[1], of_shared)), None

        zeros = jax.tree.map(jnp.zeros_like, (tokens, shared))
        gradients, _ = jax.lax.scan(one_block, zeros, jnp.arange(length // block))
        return *gradients, None

    run.defvjp(forward, backward)
    return run(tokens, shared, masks)
