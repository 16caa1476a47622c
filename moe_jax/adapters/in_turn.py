"""Slots that run one after another, and in the backward pass over a few tokens at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.layers.token_blocks import put_block, take_block

UNROLLED = 2
"""So many slots are written out one by one; of more, all but the first are rounds of a loop."""


class Operands(NamedTuple):
    """What slots compute from. Tokens have one axis or two, [T]; what follows is up to the field.

    Attributes:
      numbers: int32 [T], which tokens these are; None among gradients.
      tokens: a tree of float [T, ...], what all slots know of each token.
      own_tokens: a tree of float [C, T, ...], what slot c alone knows of each token: its c-th.
      weights: a tree of float arrays that all slots and tokens share.
      own_weights: a tree of float [C, ...], what all tokens of slot c share.
      constants: a tree of arrays that all share and to which no gradient goes.
    """

    numbers: jax.Array | None
    tokens: Any
    own_tokens: Any
    weights: Any
    own_weights: Any
    constants: Any


SlotFunction = Callable[[int | jax.Array, Operands], tuple[Any, Any]]
"""A slot: of its place and its operands (its own ones without the axis C) it makes a tree [T, ...]
that is added up over the slots, and one of its own. The place is an int for the first slot, which
may differ from the others. It treats all tokens alike, and knows of no other arrays."""


def in_turn(slot: SlotFunction, operands: Operands, block: int | None) -> tuple[Any, Any]:
    """The sum over the slots of what they make together [T, ...], and their own, [C, T, ...].

    A slot's part of the sum is held no longer than it takes to add it, and nothing of a slot is
    kept for the backward pass but its operands. There, block after block of tokens is computed
    again, one slot after another, so that what a slot holds is held for one of them and for one
    block. (`jax.checkpoint` around each slot computes them again as well, but leaves XLA free to do
    so all at once, which it does.)

    Args:
      slot: see there.
      operands: of all slots.
      block: tokens, along their last axis, that the backward pass takes at a time; a divisor of
        that axis. None leaves the backward pass to JAX, which keeps all that it needs.
    """
    if block is None:
        return _forward(slot, operands)

    @jax.custom_vjp
    def run(operands: Operands) -> tuple[Any, Any]:
        return _forward(slot, operands)

    def keep(operands: Operands) -> tuple[Any, Any]:
        return run(operands), operands

    def backward(operands: Operands, cotangents: tuple[Any, Any]) -> tuple[Operands]:
        return (_backward(slot, operands, cotangents, block),)

    run.defvjp(keep, backward)
    return run(operands)


def _forward(slot: SlotFunction, operands: Operands) -> tuple[Any, Any]:
    def step(place: int | jax.Array, common: Operands, own: tuple[Any, Any]) -> tuple[Any, Any]:
        return slot(place, common._replace(own_tokens=own[0], own_weights=own[1]))

    own = operands.own_tokens, operands.own_weights
    return _over_slots(step, operands._replace(own_tokens=None, own_weights=None), own)


def _backward(
    slot: SlotFunction, operands: Operands, cotangents: tuple[Any, Any], block: int
) -> Operands:
    """The gradients of the operands, block by block."""
    assert operands.numbers is not None
    axis, length = operands.numbers.ndim - 1, operands.numbers.shape[-1]
    if block == length:
        return _pull_back(slot, operands, cotangents)
    summed, of_each = cotangents

    def one_block(so_far: Any, number: jax.Array) -> tuple[Any, None]:
        numbers, tokens, own_summed = take_block(
            (operands.numbers, operands.tokens, summed), number, block, axis
        )
        own_tokens, own_made = take_block((operands.own_tokens, of_each), number, block, axis + 1)
        part = operands._replace(numbers=numbers, tokens=tokens, own_tokens=own_tokens)
        new = _pull_back(slot, part, (own_summed, own_made))
        tokens, own_tokens, *weights = so_far
        return (
            put_block(tokens, new.tokens, number, block, axis),
            put_block(own_tokens, new.own_tokens, number, block, axis + 1),
            *jax.tree.map(jnp.add, weights, [new.weights, new.own_weights]),
        ), None

    differentiated = (
        operands.tokens,
        operands.own_tokens,
        operands.weights,
        operands.own_weights,
    )
    zeros = jax.tree.map(jnp.zeros_like, differentiated)
    gradients, _ = jax.lax.scan(one_block, zeros, jnp.arange(length // block))
    return Operands(None, *gradients, constants=None)


def _pull_back(slot: SlotFunction, operands: Operands, cotangents: tuple[Any, Any]) -> Operands:
    """The gradients of the operands; None where there is none."""

    def step(place: int | jax.Array, common: Any, own: Any) -> tuple[Any, Any]:
        own_tokens, own_weights, of_result = own
        given, summed = common

        def call(*differentiated: Any) -> tuple[Any, Any]:
            tokens, weights, own_tokens, own_weights = differentiated
            own = {"own_tokens": own_tokens, "own_weights": own_weights}
            return slot(place, given._replace(tokens=tokens, weights=weights, **own))

        pull = jax.vjp(call, given.tokens, given.weights, own_tokens, own_weights)[1]
        gradients = pull((summed, of_result))
        return gradients[:2], gradients[2:]

    summed, of_results = cotangents
    common = operands._replace(own_tokens=None, own_weights=None), summed
    own = operands.own_tokens, operands.own_weights, of_results
    (tokens, weights), (own_tokens, own_weights) = _over_slots(step, common, own)
    return Operands(None, tokens, own_tokens, weights, own_weights, None)


def _over_slots(
    step: Callable[[int | jax.Array, Any, Any], tuple[Any, Any]], common: Any, own: Any
) -> tuple[Any, Any]:
    """Adds up the first and stacks the second part of what `step(place, common, own)` returns.

    Args:
      step: called for every slot.
      common: what they share.
      own: a tree of arrays [C, ...]; each gets its own.
    """
    of_slot = lambda place: jax.tree.map(lambda array: array[place], own)
    count = jax.tree.leaves(own)[0].shape[0]
    total, first = step(0, common, of_slot(0))
    if count <= UNROLLED:
        results = [first]
        for place in range(1, count):
            # The next one waits, so that what this one held is free.
            its, common, total = jax.lax.optimization_barrier((of_slot(place), common, total))
            more, result = step(place, common, its)
            total = jax.tree.map(jnp.add, total, more)
            results.append(result)
        return total, jax.tree.map(lambda *parts: jnp.stack(parts), *results)

    def one(total: Any, place_and_own: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        more, result = step(place_and_own[0], common, place_and_own[1])
        return jax.tree.map(jnp.add, total, more), result

    others = jnp.arange(1, count), jax.tree.map(lambda array: array[1:], own)
    total, results = jax.lax.scan(one, total, others)
    return total, jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, results)
