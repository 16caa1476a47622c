"""Updates of the dynamic loss scale."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.training.step.optimizer import (
    GROWTH_INTERVAL,
    LossScale,
    initial_loss_scale,
    next_loss_scale,
)


@pytest.mark.parametrize(
    ("scale", "finite_steps", "finite", "new_scale", "new_finite_steps"),
    [
        (1024.0, 0, True, 1024.0, 1),
        (1024.0, 7, False, 512.0, 0),
        (1024.0, 1998, True, 1024.0, 1999),
        (1024.0, 1999, True, 2048.0, 0),  # the 2000th consecutive finite step
        (1024.0, 1999, False, 512.0, 0),
        (1.5, 3, False, 1.0, 0),  # never below one
        (1.0, 3, False, 1.0, 0),
    ],
)
def test_one_step(scale, finite_steps, finite, new_scale, new_finite_steps):
    new = next_loss_scale(LossScale(jnp.float32(scale), jnp.int32(finite_steps)), jnp.array(finite))
    assert (float(new.scale), int(new.finite_steps)) == (new_scale, new_finite_steps)
    assert (new.scale.dtype, new.finite_steps.dtype) == (np.float32, np.int32)


def test_initial_scale():
    state = initial_loss_scale(65536.0)
    assert (float(state.scale), int(state.finite_steps)) == (65536.0, 0)
    assert GROWTH_INTERVAL == 2000
