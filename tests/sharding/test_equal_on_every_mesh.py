"""Losses, gradients and untrained adapters on eight devices, against one."""

import jax
import numpy as np
import pytest
import tiny_program
from tolerances import GRADIENT_ROUNDING, ROUNDING

MESHES = {
    "8x1x1": {"data": 8, "fsdp": 1, "tensor": 1},
    "2x4x1": {"data": 2, "fsdp": 4, "tensor": 1},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "1x1x8": {"data": 1, "fsdp": 1, "tensor": 8},
}
ROUTER = {"name": "top_k", "jitter_noise": 0.1}
METHOD = {**tiny_program.MIXLORA, "dropout": 0.1, "router": ROUTER}
# Here a slot is an expert, and all of them but the first are rounds of a loop.
SOFT = {**METHOD, "router": {"name": "soft"}, "ffn_dropout": 0.1, "losses": {}}
NEW = {"new_tokens": ("<a>", "<b>", "<c>"), "new_token_id": 95}
METHODS = {"default": {**METHOD, **NEW}, "soft": {**SOFT, **NEW}}


def _run(mesh):
    """Metrics of the first step, the gradient of every leaf, and the untrained adapters."""
    program = tiny_program.program(
        METHODS,
        rows=16,
        mesh=mesh,
        config=tiny_program.model_config(num_layers=2),
        training={"micro_batches": 2},
        compute={"remat": "frozen"},
    )
    params = tiny_program.random_params(program)
    state = program.init_state(params)
    fresh = jax.tree.map(np.asarray, state.adapters)
    state = state.replace(adapters=tiny_program.random_adapters(program))
    before = jax.tree.map(np.asarray, state.adapters)
    batch = tiny_program.random_batch(32, vocab=98)
    assert (batch.tokens >= 95).sum() > 8, "new tokens"
    batch = program.put_train_batch(batch)
    state, metrics = program.train_step(state, params, batch)
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.adapters)
    return program, jax.tree.map(np.asarray, metrics), gradients, fresh, state


@pytest.fixture(scope="module")
def one_device():
    return _run(None)


@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradients_equal_one_device(one_device, mesh):
    _, expected_metrics, expected_gradients, expected_fresh, _ = one_device
    program, metrics, gradients, fresh, state = _run(MESHES[mesh])

    assert len({shard.device for shard in state.step.addressable_shards}) == 8
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, **ROUNDING, err_msg=name)
    jax.tree.map(
        lambda ours, one: np.testing.assert_allclose(ours, one, **ROUNDING), fresh, expected_fresh
    )
    jax.tree.map(
        lambda ours, one: np.testing.assert_allclose(ours, one, **GRADIENT_ROUNDING),
        gradients,
        expected_gradients,
    )
    # And the work is really divided: no device holds a whole kernel, unless only rows are split.
    kernel = program.param_shardings["layers"]["mlp"]["gate_proj"]["kernel"]
    shape = program.abstract_params["layers"]["mlp"]["gate_proj"]["kernel"].shape
    parts = np.prod(shape) // np.prod(kernel.shard_shape(shape))
    assert parts == MESHES[mesh]["fsdp"] * MESHES[mesh]["tensor"]


def test_optimizer_moments_are_sharded_like_their_adapter():
    program = tiny_program.program(
        {"default": METHOD},
        rows=16,
        mesh=MESHES["2x2x2"],
        optimizer={"name": "adamw", "learning_rate": 1e-3},
    )
    adam = program.state_shardings.opt_state.inner_states["adapter default"].inner_state
    moments = jax.tree.leaves(
        adam.inner_state, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.NamedSharding)
    )
    adapters = jax.tree.leaves(program.state_shardings.adapters)
    split = [leaf for leaf in moments if not leaf.is_fully_replicated]
    assert len(split) == 2 * len([leaf for leaf in adapters if not leaf.is_fully_replicated])
    assert len(split) > 0
