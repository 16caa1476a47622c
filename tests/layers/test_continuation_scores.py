"""Scores of continuations against log-softmax of all logits, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from moe_jax.layers import continuation_scores as module
from moe_jax.layers.continuation_scores import continuation_scores
from moe_jax.layers.vocabulary import logits

ROWS, LENGTH, WIDTH, VOCABULARY = 4, 13, 8, 37


def inputs(tied):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    shape = (VOCABULARY, WIDTH) if tied else (WIDTH, VOCABULARY)
    kernel = rng.normal(size=shape).astype(np.float32)
    counts = np.array([0, 1, 5, 12], np.int32)  # none, one, more than a chunk, all but one
    first = np.array([6, 12, 3, 0], np.int32)
    targets = rng.integers(0, VOCABULARY, size=(ROWS, LENGTH)).astype(np.int32)
    # The targets of one row are the greedy ones.
    greedy = logits(x, kernel, tied=tied, cap=None).argmax(-1)
    targets[2, :5] = greedy[2, 3:8]
    candidates = rng.integers(0, VOCABULARY, size=(ROWS, 3)).astype(np.int32)
    return x, kernel, first, targets, counts, candidates


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 1000])
def test_scores_equal_log_softmax(monkeypatch, tied, cap, chunk_tokens):
    monkeypatch.setattr(module, "CHUNK_TOKENS", chunk_tokens)
    x, kernel, first, targets, counts, candidates = inputs(tied)
    scores = jax.jit(lambda *arrays: continuation_scores(*arrays, tied=tied, cap=cap))(
        *map(jnp.asarray, (x, kernel, first, targets, counts, candidates))
    )
    values = x @ (kernel.T if tied else kernel)
    if cap is not None:
        values = cap * np.tanh(values / cap)
    log_probs = scipy.special.log_softmax(values, axis=-1)
    for row in range(ROWS):
        places = range(first[row], first[row] + counts[row])
        wanted = targets[row, : counts[row]]
        expected = sum(log_probs[row, place, t] for place, t in zip(places, wanted, strict=True))
        np.testing.assert_allclose(scores.log_probs[row], expected, rtol=1e-5, atol=1e-6)
        at_first = log_probs[row, first[row], candidates[row]]
        np.testing.assert_allclose(scores.candidates[row], at_first, rtol=1e-5)
        is_greedy = all(values[row, p].argmax() == t for p, t in zip(places, wanted, strict=True))
        assert scores.is_greedy[row] == is_greedy
    assert scores.is_greedy.tolist()[:3] == [True, False, True]


def test_no_logits_of_a_whole_batch():
    x, kernel, *others = map(jnp.asarray, inputs(False))
    long = jnp.tile(x, (1, 1000, 1))
    targets = jnp.tile(others[1], (1, 1000))
    program = jax.jit(continuation_scores).lower(long, kernel, others[0], targets, *others[2:])
    largest = program.compile().memory_analysis().temp_size_in_bytes
    assert largest < 4 * ROWS * LENGTH * 1000 * VOCABULARY / 10
