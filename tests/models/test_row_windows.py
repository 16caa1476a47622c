"""Windows of adapters give the logits of a static division of the same rows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import ROUNDING

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import NoAdapter
from moe_jax.adapters.row_window import RowWindow, replace_window, take_window
from moe_jax.adapters.rows import AdapterRows, divide_rows
from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import parse_member
from moe_jax.models.adapted import apply, untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM

CONFIG = tiny_program.model_config(num_layers=2)
NEW = {"new_tokens": ("<x>", "<y>"), "new_token_id": 94}  # in place of two ids of the base, of 96
FIELDS = {"mix": tiny_program.MIXLORA, "plain": {**tiny_program.LORA, **NEW}}
ROWS = {"base": 1, "mix": 2, "plain": 2}
WINDOWS = {  # first row and mask; the rows of `mix` are 1 and 2, those of `plain` 3 and 4
    "exact": {"mix": (1, [1, 1]), "plain": (3, [1, 1])},
    "overlapping": {"mix": (1, [1, 1, 0]), "plain": (2, [0, 1, 1])},
    "whole": {"mix": (0, [0, 1, 1, 0, 0]), "plain": (0, [0, 0, 0, 1, 1])},
}


@pytest.fixture(scope="module")
def computed():
    """The model without rows, its weights, tokens, and the logits of a static division."""
    methods = {name: parse_member(METHODS, fields, name) for name, fields in FIELDS.items()}
    bare = LlamaForCausalLM(CONFIG, ComputeConfig(dtype="float32"))
    init = functools.partial(bare.init, tokens=jnp.zeros((1, 2), jnp.int32))
    params = _random(nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))["params"])
    trees = {}
    for name, method in methods.items():
        untrained = functools.partial(untrained_adapter, bare, method)
        trees[name] = _random(nn.meta.unbox(jax.eval_shape(untrained, params, jax.random.key(0))))
    # All rows are the same tokens, with both new ones, so that logits tell adapters apart.
    tokens = np.tile(np.array([3, 94, 1, 95, 7, 40]), (5, 1))
    model = bare.clone(adapter_rows=divide_rows({"base": NoAdapter(), **methods}, ROWS))
    expected = apply(model, params, trees, LlamaForCausalLM.__call__, tokens)
    return bare, methods, params, trees, tokens, np.asarray(expected)


def _random(shapes):
    devices = jax.tree.map(lambda _: jax.devices()[0], shapes)
    return tiny_program.random_leaves(shapes, devices, seed=1)


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_equal_a_static_division(name, computed):
    bare, methods, params, trees, tokens, expected = computed
    windows = {
        adapter: RowWindow(np.int32(first), np.array(mask, bool))
        for adapter, (first, mask) in WINDOWS[name].items()
    }
    size = len(windows["mix"].mask)
    rows = tuple(AdapterRows(adapter, method, 0, size) for adapter, method in methods.items())
    model = bare.clone(adapter_rows=rows)

    def logits(module):
        return module.logits(module.hidden_states(tokens, windows=windows), windows)

    actual = apply(model, params, trees, logits)
    np.testing.assert_allclose(actual, expected, **ROUNDING)
    for one, other in ((0, 1), (1, 3), (0, 3)):
        assert np.abs(expected[one] - expected[other]).max() > 0.1


def test_rows_outside_of_the_mask_stay():
    array = jnp.arange(12.0).reshape(2, 6)
    window = RowWindow(jnp.int32(3), jnp.array([True, False, True]))
    own = take_window(window, array, axis=1)
    assert own.tolist() == [[3, 4, 5], [9, 10, 11]]
    replaced = replace_window(window, array, -own, axis=1)
    assert replaced.tolist() == [[0, 1, 2, -3, 4, -5], [6, 7, 8, -9, 10, -11]]
