"""Activations against transformers' of the same names."""

import numpy as np
import pytest
import torch
from tolerances import ROUNDING
from transformers.activations import ACT2FN

from moe_jax.layers.activation import ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_transformers(name):
    x = np.linspace(-6, 6, 241, dtype=np.float32)
    expected = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](x), expected, **ROUNDING)
