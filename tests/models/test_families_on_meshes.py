"""A model with the features of all families on eight devices, against one device."""

import dataclasses

import jax
import numpy as np
import tiny_program
from tolerances import GRADIENT_ROUNDING, ROUNDING

from moe_jax.config.model import RopeConfig

ROPE = RopeConfig(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=(1.0, 1.5),
    long_factor=(2.0, 4.0),
    original_max_position_embeddings=8,
    partial_rotary_factor=0.5,
    interleaved=True,
)
FEATURES = {
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


def _step(mesh):
    """Metrics and gradients of one step."""
    program = tiny_program.program(
        {"default": tiny_program.MIXLORA},
        mesh=mesh,
        config=tiny_program.model_config(num_layers=2, **FEATURES),
    )
    params = tiny_program.random_params(program)
    adapters = tiny_program.random_adapters(program)
    state = program.init_state(params).replace(adapters=adapters)
    before = jax.tree.map(np.asarray, adapters)
    batch = program.put_train_batch(tiny_program.random_batch(8))
    state, metrics = program.train_step(state, params, batch)
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.adapters)
    return jax.tree.map(np.asarray, metrics), gradients


def test_a_step_equals_that_of_one_device():
    metrics, gradients = _step(None)
    sharded_metrics, sharded_gradients = _step({"data": 2, "fsdp": 2, "tensor": 2})
    for name, value in metrics.items():
        np.testing.assert_allclose(sharded_metrics[name], value, **ROUNDING, err_msg=name)
    jax.tree.map(
        lambda one, many: np.testing.assert_allclose(many, one, **GRADIENT_ROUNDING),
        gradients,
        sharded_gradients,
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
