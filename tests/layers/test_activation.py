"""Activations against transformers' of the same names."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import GRADIENT_ROUNDING, ROUNDING
from transformers.activations import ACT2FN

from moe_jax.layers.activation import ACTIVATIONS, gated


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_transformers(name):
    x = np.linspace(-6, 6, 241, dtype=np.float32)
    expected = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](x), expected, **ROUNDING)


@pytest.mark.parametrize("name", ["silu", "relu"])
def test_gating_equals_the_product_with_its_gradients(name):
    # Beyond 88.7, exp(-gate) is no float32; there silu and its slope are 0 to its precision.
    gate = np.concatenate([np.linspace(-6, 6, 241), [-1e4, -200.0, -89.0, 200.0]]).astype("f4")
    up = np.linspace(-3, 3, gate.size, dtype=np.float32)
    cotangent = np.linspace(2, -1, gate.size, dtype=np.float32)
    theirs = [torch.tensor(array, requires_grad=True) for array in (gate, up)]
    expected = ACT2FN[name](theirs[0]) * theirs[1]
    expected.backward(torch.tensor(cotangent))

    ours, pull_back = jax.vjp(partial(gated, ACTIVATIONS[name]), jnp.array(gate), jnp.array(up))
    np.testing.assert_allclose(ours, expected.detach().numpy(), **ROUNDING)
    for gradient, their in zip(pull_back(jnp.array(cotangent)), theirs, strict=True):
        np.testing.assert_allclose(gradient, their.grad.numpy(), **GRADIENT_ROUNDING)


def test_gating_of_bfloat16_is_rounded_once():
    gate, up = (jnp.linspace(*ends, 401, dtype=jnp.bfloat16) for ends in ((-9, 9), (4, -4)))
    exact = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    np.testing.assert_array_equal(gated(jax.nn.silu, gate, up), exact.astype(jnp.bfloat16))
