"""A step on a base in four bits equals the step on its dequantized kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import GRADIENT_ROUNDING, ROUNDING

from moe_jax.layers.quantized import QuantizedKernel, dense_kernel, quantize

METHOD = {**tiny_program.MIXLORA, "dora": True}
CONFIG = tiny_program.model_config(num_layers=2, hidden_size=96, intermediate_size=80)
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def _is_quantized(leaf):
    return isinstance(leaf, QuantizedKernel)


def _quantized(params, abstract, kind):
    """Random parameters with the dtypes of `abstract`."""

    def leaf(value, shape):
        if not _is_quantized(shape):
            return value.astype(shape.dtype)
        return jax.jit(jax.vmap(functools.partial(quantize, kind=kind)))(value)

    return jax.tree.map(leaf, params, abstract, is_leaf=_is_quantized)


def _step(program, params):
    """Metrics of a step, and gradients of all leaves."""
    state = program.init_state(params).replace(adapters=tiny_program.random_adapters(program))
    before = jax.tree.map(np.asarray, state.adapters)
    batch = program.put_train_batch(tiny_program.random_batch(8))
    state, metrics = program.train_step(state, params, batch)
    gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.adapters)
    return jax.tree.map(np.asarray, metrics), gradients


@pytest.fixture(scope="module")
def dense():
    """Float program, its parameters, and the parameters rounded to four bits."""
    program = tiny_program.program({"a": METHOD}, config=CONFIG)
    params = tiny_program.random_params(program)
    abstract = tiny_program.program({"a": METHOD}, config=CONFIG, param_dtype="nf4").abstract_params
    stored = _quantized(params, abstract, "nf4")
    widened = jax.tree.map(
        lambda leaf: dense_kernel(leaf) if _is_quantized(leaf) else leaf.astype(jnp.float32),
        stored,
        is_leaf=_is_quantized,
    )
    return program, params, widened, stored


@pytest.fixture(scope="module")
def expected(dense):
    program, _, widened, _ = dense
    return _step(program, widened)


@pytest.mark.parametrize("mesh", [None, MESH], ids=["one device", "2x2x2"])
def test_a_step_equals_that_of_dense_kernels(dense, expected, mesh):
    _, _, _, stored = dense
    program = tiny_program.program({"a": METHOD}, config=CONFIG, param_dtype="nf4", mesh=mesh)
    params = jax.tree.map(jax.device_put, stored, program.param_shardings)
    metrics, gradients = _step(program, params)
    for name, value in expected[0].items():
        np.testing.assert_allclose(metrics[name], value, **ROUNDING, err_msg=name)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **GRADIENT_ROUNDING),
        gradients,
        expected[1],
    )


def test_the_step_differs_from_that_of_unrounded_kernels(dense, expected):
    program, params, _, _ = dense
    metrics, _ = _step(program, params)
    assert abs(metrics["a/loss"] - expected[0]["a/loss"]) > 1e-3


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_dense_kernels_are_freed_after_their_product(kind):
    config = tiny_program.model_config(num_layers=6, hidden_size=256, intermediate_size=512)

    def temporary(param_dtype):
        program = tiny_program.program({"a": METHOD}, config=config, param_dtype=param_dtype)
        return program.compiled_train_step(8).memory_analysis().temp_size_in_bytes

    layer = 4 * 256 * (48 * 2 + 16 * 2 + 3 * 512)  # 6 heads and 2 key/value heads of 8; FFN
    # Six of these would be live if they were kept for the backward pass.
    assert temporary(kind) - temporary("float32") < 2 * layer
