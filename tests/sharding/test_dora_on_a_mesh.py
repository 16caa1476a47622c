"""DoRA on a mesh of eight devices, against one: of a projection and of experts."""

import jax
import numpy as np
import tiny_program
from tolerances import GRADIENT_ROUNDING, ROUNDING

METHOD = {**tiny_program.MIXLORA, "dora": True}


def _run(mesh):
    """Untrained adapters, and the loss and gradients of a step from random ones."""
    config = tiny_program.model_config(num_layers=2)
    program = tiny_program.program({"default": METHOD}, mesh=mesh, config=config)
    params = tiny_program.random_params(program)
    state = program.init_state(params)
    fresh = jax.tree.map(np.asarray, state.adapters)
    start = jax.tree.map(lambda leaf, noise: leaf + noise, fresh, _noise(fresh))
    shardings = program.state_shardings.adapters
    state = state.replace(adapters=jax.device_put(start, shardings))
    batch = program.put_train_batch(tiny_program.random_batch(8))
    state, metrics = program.train_step(state, params, batch)
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), start, state.adapters)
    return shardings["default"]["layers"], fresh, float(metrics["default/loss"]), gradients


def _noise(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), tree)


def test_norms_losses_and_gradients_equal_one_device():
    _, expected_fresh, expected_loss, expected_gradients = _run(None)
    shardings, fresh, loss, gradients = _run({"data": 1, "fsdp": 2, "tensor": 4})

    np.testing.assert_allclose(loss, expected_loss, **ROUNDING)
    for ours, expected, tolerance in (
        (fresh, expected_fresh, ROUNDING),
        (gradients, expected_gradients, GRADIENT_ROUNDING),
    ):
        jax.tree_util.tree_map_with_path(
            lambda path, a, b, tolerance=tolerance: np.testing.assert_allclose(
                a, b, **tolerance, err_msg=jax.tree_util.keystr(path)
            ),
            ours,
            expected,
        )
    moved = gradients["default"]["layers"]["self_attn"]["q_proj"]["magnitude"]
    assert np.abs(moved).max() > 1e-4
    # A magnitude is split as its projection's outputs are.
    up = shardings["mlp"]["moe"]["up_proj"]["magnitude"]
    assert up.shard_shape((2, 4, 80)) == (2, 4, 20)
    o = shardings["self_attn"]["o_proj"]["magnitude"]
    assert o.shard_shape((2, 48)) == (2, 24)
