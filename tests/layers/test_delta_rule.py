"""The chunked gated delta rule against transformers' loop over tokens, forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import DELTA_RULE_OF_LARGEST, ROUNDING
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from moe_jax.layers.delta_rule import CHUNK, DeltaInputs, gated_delta_rule, unit_lower_inverse

BATCH, KEY_HEADS, HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 2, 4, 6, 5
GATED = jax.jit(gated_delta_rule)


def _inputs(length: int, seed: int = 0) -> DeltaInputs:
    """Queries of the usual scale, keys of unit length, decays from 1 down to e^-8, any rates."""
    rng = np.random.default_rng(seed)

    def unit(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    keys = (BATCH, length, KEY_HEADS, KEY_WIDTH)
    values = (BATCH, length, HEADS)
    return DeltaInputs(
        query=unit(*keys) * np.float32(KEY_WIDTH**-0.5),
        key=unit(*keys),
        value=rng.standard_normal((*values, VALUE_WIDTH), np.float32),
        log_decay=-(8 * rng.random(values, np.float32) ** 4),
        rate=rng.random(values, np.float32),
    )


def _reference(inputs: DeltaInputs, state=None) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' recurrence; it scales the queries itself."""
    tensors = [x if torch.is_tensor(x) else torch.tensor(np.asarray(x)) for x in inputs]
    query, key, value, log_decay, rate = tensors
    return torch_recurrent_gated_delta_rule(
        query * KEY_WIDTH**0.5,
        key,
        value,
        g=log_decay,
        beta=rate,
        initial_state=state,
        output_final_state=True,
    )


def _assert_close(ours, expected: np.ndarray) -> None:
    limit = DELTA_RULE_OF_LARGEST * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=limit)


LENGTHS = [1, 7, CHUNK, 2 * CHUNK + 37]


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_recurrence(length):
    inputs = _inputs(length)
    state = np.random.default_rng(1).standard_normal((BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH))
    state = state.astype(np.float32)
    for first in (None, state):
        expected = _reference(inputs, None if first is None else torch.tensor(first))
        for ours, theirs in zip(GATED(inputs, state=first), expected, strict=True):
            assert ours.dtype == jnp.float32
            _assert_close(ours, theirs.numpy())


@pytest.mark.parametrize("length", [7, CHUNK, CHUNK + 19])
def test_gradients_equal_those_of_the_recurrence(length):
    inputs, rng = _inputs(length), np.random.default_rng(2)
    to_output = rng.standard_normal((BATCH, length, HEADS, VALUE_WIDTH), np.float32)
    to_state = rng.standard_normal((BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH), np.float32)
    first = rng.standard_normal(to_state.shape, np.float32)

    @jax.jit
    def gradients(inputs, first):
        def total(inputs, first):
            output, last = gated_delta_rule(inputs, state=first)
            return jnp.sum(output * to_output) + jnp.sum(last * to_state)

        return jax.grad(total, argnums=(0, 1))(inputs, first)

    tensors = [torch.tensor(x, requires_grad=True) for x in (*inputs, first)]
    output, last = _reference(DeltaInputs(*tensors[:-1]), tensors[-1])
    (output * torch.tensor(to_output)).sum().add((last * torch.tensor(to_state)).sum()).backward()
    ours, of_state = gradients(inputs, first)
    for gradient, tensor in zip((*ours, of_state), tensors, strict=True):
        assert tensor.grad is not None
        _assert_close(gradient, tensor.grad.numpy())


def test_sequences_of_a_row_do_not_see_each_other():
    """Sequences that begin within, between and at chunks equal rows of their own."""
    starts = (0, 5, 6, 40, CHUNK, 2 * CHUNK + 3, 2 * CHUNK + 40)
    length = 3 * CHUNK - 7
    inputs = _inputs(length)
    begins = np.zeros((BATCH, length), bool)
    begins[:, list(starts)] = True
    output, last = GATED(inputs, begins)
    own = None
    for start, stop in zip(starts, (*starts[1:], length), strict=True):
        part = DeltaInputs(*(x[:, start:stop] for x in inputs))
        expected, own = _reference(part)
        _assert_close(output[:, start:stop], expected.numpy())
    assert own is not None
    _assert_close(last, own.numpy())
    assert np.abs(np.asarray(GATED(inputs)[0]) - np.asarray(output)).max() > 0.1

    first = np.ones((BATCH, HEADS, KEY_WIDTH, VALUE_WIDTH), np.float32)
    np.testing.assert_array_equal(GATED(inputs, begins, first)[0], output)


def test_decays_that_underflow_have_finite_gradients():
    inputs = _inputs(2 * CHUNK)
    inputs = inputs._replace(log_decay=np.full_like(inputs.log_decay, -40.0))
    total = jax.jit(jax.grad(lambda inputs: jnp.sum(gated_delta_rule(inputs)[0])))
    for gradient in total(inputs):
        assert np.isfinite(gradient).all()


def test_equal_keys_do_not_cancel():
    """Keys all alike, full rates and no decay: each token replaces the value before it."""
    inputs = _inputs(CHUNK)
    inputs = inputs._replace(
        key=np.broadcast_to(inputs.key[:, :1], inputs.key.shape),
        log_decay=np.zeros_like(inputs.log_decay),
        rate=np.ones_like(inputs.rate),
    )
    query_key = np.einsum("bskd,bskd->bsk", inputs.query, inputs.key)
    expected = np.repeat(query_key, HEADS // KEY_HEADS, axis=2)[..., None] * inputs.value
    np.testing.assert_allclose(GATED(inputs)[0], expected, **ROUNDING)


def test_inverse():
    rng = np.random.default_rng(3)
    strict = np.tril(rng.standard_normal((3, 16, 16)), -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(16) + strict.astype(np.float64))
    ours = jax.jit(unit_lower_inverse)(strict)
    limit = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=limit)
