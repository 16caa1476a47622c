"""Log-probabilities of targets against log-softmax of all logits, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from moe_jax.layers import target_scores as module
from moe_jax.layers.target_scores import target_scores
from moe_jax.layers.vocabulary import logits

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 13, 8, 37
COUNTS = (0, 1, 5, 13)  # none, one, more than a chunk, all


def inputs(tied):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    shape = (VOCABULARY, WIDTH) if tied else (WIDTH, VOCABULARY)
    kernel = rng.normal(size=shape).astype(np.float32)
    places = rng.integers(0, LENGTH, size=(ROWS, LENGTH)).astype(np.int32)  # some more than once
    targets = rng.integers(0, VOCABULARY, size=(ROWS, LENGTH)).astype(np.int32)
    # The targets of one row are the most likely ones.
    likeliest = logits(x, kernel, tied=tied, cap=None).argmax(-1)
    targets[2] = likeliest[2, places[2]]
    return x, kernel, places, targets, np.array(COUNTS, np.int32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 1000])
def test_scores_equal_log_softmax(monkeypatch, tied, cap, chunk_tokens):
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk_tokens)
    x, kernel, places, targets, counts = inputs(tied)
    log_probs, is_likeliest = jax.jit(lambda *arrays: target_scores(*arrays, tied=tied, cap=cap))(
        *map(jnp.asarray, (x, kernel, places, targets, counts))
    )
    assert log_probs.shape == is_likeliest.shape == (ROWS, LENGTH)
    values = x @ (kernel.T if tied else kernel)
    if cap is not None:
        values = cap * np.tanh(values / cap)
    expected = scipy.special.log_softmax(values, axis=-1)
    for row, count in enumerate(COUNTS):
        for place, target, found, likeliest in zip(
            *(array[row, :count] for array in (places, targets, log_probs, is_likeliest)),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected[row, place, target], rtol=1e-5, atol=1e-6)
            assert likeliest == (values[row, place].argmax() == target)
    assert is_likeliest[2, : COUNTS[2]].all()
    assert not is_likeliest[3].all()


def test_no_logits_of_a_whole_batch():
    x, kernel, places, targets, counts = map(jnp.asarray, inputs(False))
    long = [jnp.tile(array, (1, 1000, *[1] * (array.ndim - 2))) for array in (x, places, targets)]
    program = jax.jit(target_scores).lower(long[0], kernel, *long[1:], counts)
    largest = program.compile().memory_analysis().temp_size_in_bytes
    assert largest < 4 * ROWS * LENGTH * 1000 * VOCABULARY / 10
