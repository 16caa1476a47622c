"""Sampling by settings of each row, compared with the sampling of static settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import FEW_OPERATIONS

from moe_jax.inference.decoding import NOT_FINITE, next_token
from moe_jax.inference.settings import SamplingConfig
from moe_jax.serving.answer import AnswerRequest
from moe_jax.serving.call_rows import row_settings
from moe_jax.serving.row_sampling import TokenHistory, begin_row, choose_tokens

V, ROWS = 40, 6
SETTINGS = [
    {},
    {"temperature": 1.5},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.2, "top_p": 0.6, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.4},
    {"repetition_penalty": 3.0},
]
PROMPT = (4, 9, 9, 31)


@pytest.fixture(scope="module")
def choose():
    return jax.jit(choose_tokens)


def settings_of(*requests):
    """Settings of rows with these fields, in a call with one row of padding."""
    given = [AnswerRequest(tokens=PROMPT, **{"temperature": 0.0, **r}) for r in requests]
    return row_settings(given, len(requests) + 1, V)


def empty_history(slots):
    return TokenHistory(jnp.zeros((slots + 1, V), jnp.int32), jnp.zeros((slots + 1, V), bool))


def test_tokens_are_those_of_static_settings(choose):
    logits = jax.random.normal(jax.random.key(3), (ROWS + 1, V))
    history = empty_history(ROWS)
    in_prompt = np.zeros(V, bool)
    in_prompt[list(PROMPT)] = True
    for slot in range(ROWS):
        history = begin_row(history, jnp.int32(slot), in_prompt)
    drawn = set()
    for seed in range(20):
        rows = settings_of(*({**fields, "seed": seed, "sample": 1} for fields in SETTINGS))
        lengths = np.arange(ROWS + 1, dtype=np.int32) + 7
        slots = np.array([0, 1, 2, 3, 4, 5, ROWS], np.int32)
        chosen, _ = choose(logits, history, rows, slots, lengths)
        for row, fields in enumerate(SETTINGS):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 1)
            keys = jax.random.fold_in(key, lengths[row])[None]
            seen = jnp.asarray(in_prompt)[None]
            expected = next_token(logits[row : row + 1], seen, keys, SamplingConfig(**fields))
            assert int(chosen.tokens[row]) == int(expected[0]), (seed, fields)
            drawn.add((row, int(expected[0])))
    assert len(drawn) > 20


def test_penalties_by_hand(choose):
    """Token 5 has 10.0, 6 has 9.5 and 7 has 9.2: each is chosen until its penalty exceeds."""
    logits = jnp.zeros((2, V)).at[0, 5].set(10.0).at[0, 6].set(9.5).at[0, 7].set(9.2)
    rows = settings_of({"frequency_penalty": 0.4, "presence_penalty": 0.3})
    history, tokens = empty_history(1), []
    for step in range(6):
        arguments = np.array([0, 1], np.int32), np.array([step, 0], np.int32)
        chosen, history = choose(logits, history, rows, *arguments)
        tokens.append(int(chosen.tokens[0]))
    # 5 falls to 9.3, 6 to 8.8, 5 to 8.9, 7 to 8.5, 5 to 8.5, and 6 has 8.8.
    assert tokens == [5, 6, 5, 7, 5, 6]
    rows = settings_of({"presence_penalty": 0.6})
    history = begin_row(history, jnp.int32(0), jnp.zeros(V, bool))
    tokens = []
    for step in range(5):
        arguments = np.array([0, 1], np.int32), np.array([step, 0], np.int32)
        chosen, history = choose(logits, history, rows, *arguments)
        tokens.append(int(chosen.tokens[0]))
    assert tokens == [5, 6, 5, 5, 5]  # 9.4, 8.9, and each time 9.4 once more


def test_logprobs_and_logits_that_are_not_finite(choose):
    logits = jnp.log(jnp.arange(1.0, V + 1))[None].repeat(4, axis=0)
    logits = logits.at[1, 2].set(jnp.nan).at[2, 3].set(jnp.inf)
    rows = settings_of({"logprobs": 2}, {"temperature": 1.0}, {})
    slots = np.array([0, 1, 2, 3], np.int32)
    chosen, _ = choose(logits, empty_history(3), rows, slots, slots)
    assert chosen.tokens[:3].tolist() == [V - 1, NOT_FINITE, NOT_FINITE]
    total = V * (V + 1) / 2
    np.testing.assert_allclose(chosen.logprobs[0], np.log(V / total), **FEW_OPERATIONS)
    assert chosen.top_tokens[0, :3].tolist() == [V - 1, V - 2, V - 3]
    expected = np.log(np.array([V, V - 1, V - 2]) / total)
    np.testing.assert_allclose(chosen.top_logprobs[0, :3], expected, **FEW_OPERATIONS)
    unwanted, _ = choose(logits, empty_history(3), settings_of({}, {}, {}), slots, slots)
    assert not unwanted.top_logprobs.any()
