"""Initial values of untrained adapters, and their independence from one another."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_program

from moe_jax.adapters import METHODS
from moe_jax.adapters.rows import divide_rows
from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import parse_member
from moe_jax.models.adapted import untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.axes import EXPERTS, LAYERS, MLP

CONFIG = tiny_program.model_config(num_layers=2)
DORA = {"dora": True}
RECORDED_SUMS = {
    "layers/mlp/moe/router/kernel": 6.072043531698,
    "layers/mlp/moe/gate_proj/lora_A": 111.39354884334534,
    "layers/self_attn/q_proj/lora_A": 28.179116542363772,
}
"""Sums of the absolute initial values of `MIXLORA` with seed 0, from version 0.1.0."""


@pytest.fixture(scope="module")
def params():
    """A random base whose columns all have different lengths."""
    return tiny_program.random_params(tiny_program.program({"x": tiny_program.LORA}, config=CONFIG))


def _method(fields):
    return parse_member(METHODS, fields, "method")


def _fresh(fields, params, seed=0, neighbors=()):
    methods = {f"other_{i}": _method(other) for i, other in enumerate(neighbors)}
    adapter_rows = divide_rows(methods, dict.fromkeys(methods, 3))
    model = LlamaForCausalLM(CONFIG, ComputeConfig(dtype="float32"), adapter_rows)
    make = jax.jit(lambda params, key: untrained_adapter(model, _method(fields), params, key))
    return make(params, jax.random.key(seed))


def _named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def _kernel(params, path):
    """Kernel [L, in, out] of the projection of an adapter's leaf."""
    _, block, *site, _ = path.split("/")
    return np.asarray(params["layers"][block][site[-1]]["kernel"])


@pytest.mark.parametrize("method", [tiny_program.LORA, tiny_program.MIXLORA])
def test_magnitudes_are_the_lengths_of_the_bases_columns(params, method):
    fresh = _named(_fresh({**method, **DORA}, params))
    magnitudes = {path: leaf for path, leaf in fresh.items() if path.endswith("magnitude")}
    assert len(magnitudes) == len(tiny_program.ALL_TARGETS)
    for path, leaf in magnitudes.items():
        lengths = np.sqrt((_kernel(params, path) ** 2).sum(axis=1))  # [L, out]
        if "/moe/" in path:  # of every expert
            lengths = np.broadcast_to(lengths[:, None], leaf.shape)
        np.testing.assert_allclose(leaf, lengths, rtol=1e-6, err_msg=path)
        assert lengths.std() > 0.01


def test_the_base_and_the_neighbors_change_no_pair(params):
    fields = {**tiny_program.MIXLORA, **DORA}
    fresh = _named(_fresh(fields, params))
    for path, leaf in fresh.items():
        assert (leaf == 0).all() == path.endswith("lora_B"), path
    others = [tiny_program.LORA, tiny_program.MIXLORA]
    beside = _named(_fresh(fields, params, neighbors=others))
    jax.tree.map(np.testing.assert_array_equal, fresh, beside)
    twice = jax.tree.map(lambda leaf: 2.0 * leaf, params)
    scaled = _named(_fresh(fields, twice))
    for path, leaf in fresh.items():
        expected = 2.0 * leaf if path.endswith("magnitude") else leaf
        np.testing.assert_allclose(scaled[path], expected, rtol=1e-6, err_msg=path)


def test_another_key_changes_all_random_leaves_only(params):
    fields = {**tiny_program.MIXLORA, **DORA}
    one, other = (_named(_fresh(fields, params, seed)) for seed in (0, 1))
    for path, leaf in one.items():
        drawn = path.endswith(("lora_A", "kernel"))
        assert (leaf != other[path]).any() == drawn, path


def test_leaves_have_logical_axes(params):
    tree = _fresh({**tiny_program.MIXLORA, **DORA}, params)
    magnitude = tree["layers"]["mlp"]["moe"]["up_proj"]["magnitude"]
    assert isinstance(magnitude, nn.LogicallyPartitioned)
    assert magnitude.names == (LAYERS, EXPERTS, MLP)


def test_a_seed_gives_the_same_weights_in_every_release(params):
    """Linen derives random keys from module names, so that a renamed module would change them."""
    tree = _named(_fresh(tiny_program.MIXLORA, params))
    for path, expected in RECORDED_SUMS.items():
        np.testing.assert_allclose(np.abs(tree[path]).sum(dtype=np.float64), expected, rtol=1e-6)
