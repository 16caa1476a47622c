"""Models with the features of all families on eight devices, against one device."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_program
from tolerances import DELTA_NET_GRADIENT_OF_LARGEST, GRADIENT_ROUNDING, ROUNDING

from moe_jax.adapters.tree import DELTA_NET_MODULES, LAYER_EMBEDDING_MODULES
from moe_jax.config.attention import DeltaNetConfig, GlobalAttentionConfig
from moe_jax.config.rope import RopeConfig

ROPE = RopeConfig(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=(1.0, 1.5),
    long_factor=(2.0, 4.0),
    original_max_position_embeddings=8,
    partial_rotary_factor=0.5,
    interleaved=True,
)
GEMMA_AND_GLM = {
    "qkv_bias": True,
    "qk_norm": True,
    "post_norms": True,
    "norm_unit_offset": True,
    "scale_embeddings": True,
    "query_pre_attn_scalar": 12.0,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
    "sliding_window": 4,
    "layer_types": ("sliding_attention", "full_attention"),
    "rope": ROPE,
    "sliding_rope": dataclasses.replace(ROPE, rope_theta=500.0),
}
OLMO_TO_COHERE = {
    "qk_norm": True,
    "qk_norm_of": "projection",
    "pre_norms": False,
    "post_norms": True,
    "parallel_block": True,
    "norm_centered": True,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logit_scale": 0.5,
    "rotated_layers": (True, False),
    "rope": dataclasses.replace(ROPE, llama_4_scaling_beta=0.5),
}
DELTA_NET = {
    "qk_norm": True,
    "norm_unit_offset": True,
    "attention_gate": True,
    "layer_types": ("linear_attention", "full_attention"),
    "delta_net": DeltaNetConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=6, filter_width=3
    ),
}
GLOBAL_ATTENTION = {
    "qk_norm": True,
    "value_norm": True,
    "layer_scale": True,
    "post_norms": True,
    "query_pre_attn_scalar": 1.0,
    "sliding_window": 4,
    "layer_types": ("sliding_attention", "full_attention"),
    "rope": RopeConfig(rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0.25),
    "sliding_rope": RopeConfig(rope_type="default", rope_theta=10000.0),
    "global_attention": GlobalAttentionConfig(num_kv_heads=2, head_dim=16, key_as_value=True),
}
READERS = {
    **GLOBAL_ATTENTION,
    "num_layers": 4,
    "layer_types": ("sliding_attention", "full_attention") * 2,
    "num_reader_layers": 2,
    "layer_embedding_width": 8,
}
MIXLORA = tiny_program.MIXLORA
ON_DELTA_NET = {**MIXLORA, "target_modules": (*MIXLORA["target_modules"], *DELTA_NET_MODULES)}
ON_LAYER_EMBEDDINGS = {
    **MIXLORA,
    "target_modules": (*MIXLORA["target_modules"], *LAYER_EMBEDDING_MODULES),
}


def _step(method, features, mesh):
    """Metrics and gradients of one step."""
    program = tiny_program.program(
        {"default": method},
        mesh=mesh,
        config=tiny_program.model_config(**{"num_layers": 2, **features}),
    )
    params = tiny_program.random_params(program)
    adapters = tiny_program.random_adapters(program)
    state = program.init_state(params).replace(adapters=adapters)
    before = jax.tree.map(np.asarray, adapters)
    batch = program.put_train_batch(tiny_program.random_batch(8))
    state, metrics = program.train_step(state, params, batch)
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.adapters)
    return jax.tree.map(np.asarray, metrics), gradients


def _rounding(leaf):
    """Tolerance of gradients that are small beside the largest of their leaf."""
    largest = float(np.abs(leaf).max())
    return {"rtol": 0, "atol": DELTA_NET_GRADIENT_OF_LARGEST * largest}


@pytest.mark.parametrize(
    ("method", "features", "tolerance"),
    [
        pytest.param(MIXLORA, GEMMA_AND_GLM, lambda _: GRADIENT_ROUNDING, id="gemma_and_glm"),
        pytest.param(MIXLORA, OLMO_TO_COHERE, lambda _: GRADIENT_ROUNDING, id="olmo_to_cohere"),
        pytest.param(ON_DELTA_NET, DELTA_NET, _rounding, id="delta_net"),
        pytest.param(MIXLORA, GLOBAL_ATTENTION, lambda _: GRADIENT_ROUNDING, id="gemma4"),
        pytest.param(ON_LAYER_EMBEDDINGS, READERS, _rounding, id="gemma4_e4b"),
    ],
)
def test_a_step_equals_that_of_one_device(method, features, tolerance):
    metrics, gradients = _step(method, features, None)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    sharded_metrics, sharded_gradients = _step(method, features, mesh)
    for name, value in metrics.items():
        np.testing.assert_allclose(sharded_metrics[name], value, **ROUNDING, err_msg=name)
    jax.tree.map(
        lambda one, many: np.testing.assert_allclose(many, one, **tolerance(one)),
        gradients,
        sharded_gradients,
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
