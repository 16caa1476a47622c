"""Dynamic loss scaling for float16 (arXiv:1710.03740, section 3.2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

GROWTH_INTERVAL = 2000
"""Finite steps in a row after which the scale doubles."""


class LossScale(NamedTuple):
    """State of one adapter's scale; each adapter has its own, so that none disturbs another.

    Attributes:
      scale: float32 [], what the loss is multiplied by before differentiation.
      finite_steps: int32 [], steps with a finite gradient since the last change.
    """

    scale: jax.Array
    finite_steps: jax.Array


def initial_loss_scale(scale: float) -> LossScale:
    """The state at the start of training."""
    return LossScale(jnp.float32(scale), jnp.int32(0))


def updated(state: LossScale, finite: jax.Array) -> LossScale:
    """Halves the scale after a gradient that was not finite; doubles it after a long calm."""
    grown = state.finite_steps + 1 >= GROWTH_INTERVAL
    after_finite = LossScale(
        jnp.where(grown, state.scale * 2.0, state.scale),
        jnp.where(grown, 0, state.finite_steps + 1),
    )
    after_overflow = LossScale(
        jnp.maximum(state.scale / 2.0, 1.0), jnp.zeros_like(grown, jnp.int32)
    )
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), after_finite, after_overflow)
