"""Layers with variables of their own, instead of stacked ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tiny_program import LORA, MIXLORA, model_config

from moe_jax.adapters import METHODS
from moe_jax.adapters.rows import divide_rows
from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import parse_member
from moe_jax.models.adapted import apply, untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.models.layer_views import join_layers, layer_views, split_layers

FIELDS = {"lora": LORA, "mixlora": MIXLORA}
SLIDING = {
    "sliding_window": 3,
    "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
}


def random_weights(tree, seed):
    """Weights of the tree's shapes, so that B and the norms count as well."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree))))
    return jax.tree.map(lambda leaf: 0.1 * jax.random.normal(next(keys), leaf.shape), tree)


def test_separate_layers_compute_what_stacked_layers_compute():
    config = model_config(**SLIDING)
    methods = {name: parse_member(METHODS, fields, "method") for name, fields in FIELDS.items()}
    rows = divide_rows(methods, dict.fromkeys(methods, 2))
    stacked = LlamaForCausalLM(config, ComputeConfig(dtype="float32"), rows)
    separate = stacked.clone(scan_layers=False)
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, config.vocab_size)
    boxed = LlamaForCausalLM(config, ComputeConfig(dtype="float32")).init(jax.random.key(0), tokens)
    params = random_weights(nn.meta.unbox(boxed["params"]), 2)
    adapters = {
        name: random_weights(
            nn.meta.unbox(untrained_adapter(stacked, method, params, jax.random.key(3))), 4
        )
        for name, method in methods.items()
    }
    expected = apply(stacked, params, adapters, LlamaForCausalLM.__call__, tokens)
    views = (
        layer_views(config, params),
        {name: layer_views(config, tree) for name, tree in adapters.items()},
    )
    actual = apply(separate, *views, LlamaForCausalLM.__call__, tokens)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

    last_first = jax.tree.map(lambda leaf: leaf[::-1], params["layers"])
    other = apply(
        stacked, {**params, "layers": last_first}, adapters, LlamaForCausalLM.__call__, tokens
    )
    assert np.abs(other - expected).max() > 0.01


def test_views_share_the_memory_of_the_stack():
    kernel = jnp.ones((3, 16, 16))
    views = layer_views(model_config(), {"layers": {"kernel": kernel}, "norm": jnp.ones(5)})
    assert sorted(views) == ["layers_0", "layers_1", "layers_2", "norm"]
    start = kernel.unsafe_buffer_pointer()
    addresses = [views[f"layers_{i}"]["kernel"].unsafe_buffer_pointer() for i in range(3)]
    assert addresses == [start + 1024 * i for i in range(3)]  # 16 * 16 * 4 bytes


def test_views_that_are_not_aligned_are_copied():
    kernel = jnp.arange(21.0).reshape(3, 7)
    views = layer_views(model_config(), {"layers": {"kernel": kernel}})
    for index in range(3):
        np.testing.assert_array_equal(views[f"layers_{index}"]["kernel"], kernel[index])


def test_joining_layers_is_the_inverse_of_splitting_them():
    stacked = jnp.arange(11 * 4.0).reshape(11, 2, 2)  # more than ten, whose names sort otherwise
    tree = {"layers": {"mlp": {"kernel": stacked}}, "norm": jnp.ones(5)}
    joined = join_layers(split_layers(model_config(num_layers=11), tree))
    assert sorted(joined) == ["layers", "norm"]
    np.testing.assert_array_equal(joined["layers"]["mlp"]["kernel"], stacked)
    assert join_layers(tree) == tree
