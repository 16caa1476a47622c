"""Sampling compared with transformers' logits processors, and frequencies of the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import tiny_llama
from tolerances import ROUNDING
from transformers.generation import logits_process as theirs

from moe_jax.config.parse import parse
from moe_jax.errors import UserError
from moe_jax.inference.decoding import NOT_FINITE, filtered_logits, next_token
from moe_jax.inference.settings import SamplingConfig

ROWS, VOCABULARY = 4, 50
CONFIGS = [
    SamplingConfig(),
    SamplingConfig(repetition_penalty=1.7),
    SamplingConfig(1.0),
    SamplingConfig(0.7),
    SamplingConfig(1.3, top_k=5),
    SamplingConfig(1.0, top_k=400),
    SamplingConfig(1.0, top_p=0.8),
    SamplingConfig(1.0, top_p=0.01),
    SamplingConfig(1.0, min_p=0.2),
    SamplingConfig(1.0, min_p=1.0),
    SamplingConfig(0.8, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=0.8),
]


def some_logits():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((ROWS, VOCABULARY)).astype(np.float32)
    logits[1] = np.round(logits[1])  # ties
    ids = rng.integers(0, VOCABULARY, (ROWS, 12))
    seen = np.zeros((ROWS, VOCABULARY), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    return logits, ids, seen


def expected_scores(logits, ids, config):
    """Scores by transformers' processors; the next test checks their order."""
    processors = theirs.LogitsProcessorList()
    if config.repetition_penalty != 1:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature > 0:
        processors.append(theirs.TemperatureLogitsWarper(config.temperature))
        if config.top_k is not None:
            processors.append(theirs.TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            processors.append(theirs.TopPLogitsWarper(config.top_p))
        if config.min_p > 0:
            processors.append(theirs.MinPLogitsWarper(config.min_p))
    return processors(torch.tensor(ids), torch.tensor(logits)).numpy()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_filters_equal_those_of_transformers(config):
    logits, ids, seen = some_logits()
    actual = filtered_logits(jnp.asarray(logits), jnp.asarray(seen), config)
    expected = expected_scores(logits, ids, config)
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, **ROUNDING)
    if config.top_k == 5:
        assert np.isfinite(actual).sum(axis=1).tolist() == [5, 6, 5, 5]  # two are equal
    if config.top_p == 0.01:
        assert np.isfinite(actual).sum(axis=1).tolist() == [1, 1, 1, 1]


def test_processors_are_in_the_order_of_generate():
    """The list of `expected_scores` is the one that `generate` builds."""
    model = tiny_llama()
    options = dict(do_sample=True, temperature=0.8, top_k=12, top_p=0.9, min_p=0.05)
    options |= dict(repetition_penalty=0.8)
    config, _ = model._prepare_generation_config(None, **options)
    model._prepare_special_tokens(config, device="cpu")
    names = [type(p).__name__ for p in model._get_logits_processor(config, input_ids_seq_length=3)]
    assert names == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1]], ids=str)
def test_greedy_is_argmax(config):
    logits, ids, seen = some_logits()
    keys = jax.random.split(jax.random.key(0), ROWS)
    actual = next_token(jnp.asarray(logits), jnp.asarray(seen), keys, config)
    assert actual.dtype == jnp.int32
    expected = expected_scores(logits, ids, config).argmax(axis=1)
    np.testing.assert_array_equal(actual, expected)
    # The penalty matters: every row's likeliest token counts as seen.
    everything = np.zeros_like(seen)
    np.put_along_axis(everything, logits.argmax(axis=1)[:, None], True, axis=1)
    penalized = next_token(jnp.asarray(logits), jnp.asarray(everything), keys, config)
    assert (config.repetition_penalty == 1) == np.array_equal(penalized, logits.argmax(axis=1))


@pytest.mark.parametrize("config", [CONFIGS[3], CONFIGS[-1]], ids=str)
def test_frequencies_follow_the_distribution(config):
    logits, ids, seen = some_logits()
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    draw = jax.jit(lambda *arguments: next_token(*arguments, config))
    for row in range(2):
        shape = (draws, VOCABULARY)
        tokens = draw(
            jnp.broadcast_to(logits[row], shape), jnp.broadcast_to(seen[row], shape), keys
        )
        counts = np.bincount(tokens, minlength=VOCABULARY)
        scores = torch.tensor(expected_scores(logits, ids, config)[row]).double()
        expected = draws * torch.softmax(scores, -1).numpy()
        assert counts[expected == 0].sum() == 0
        # Pearson's statistic, cells that expect fewer than 5 pooled; with k degrees of freedom its
        # mean is k and its variance 2 k.
        likely = expected >= 5
        cells = [*zip(counts[likely], expected[likely], strict=True)]
        if expected[~likely].sum() > 0:
            cells.append((counts[~likely].sum(), expected[~likely].sum()))
        statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
        freedom = len(cells) - 1
        assert freedom > 2
        assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_a_row_depends_on_its_key_and_logits_alone():
    logits, _, seen = some_logits()
    keys = jax.random.split(jax.random.key(2), ROWS)
    config = CONFIGS[-1]
    together = next_token(jnp.asarray(logits), jnp.asarray(seen), keys, config)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = next_token(jnp.asarray(logits[one]), jnp.asarray(seen[one]), keys[one], config)
        assert int(alone[0]) == int(together[row])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(bad, temperature):
    logits, _, seen = some_logits()
    logits[2, 7] = bad
    logits[3, 7] = -np.inf  # a token that a model rules out
    keys = jax.random.split(jax.random.key(3), ROWS)
    actual = next_token(jnp.asarray(logits), jnp.asarray(seen), keys, SamplingConfig(temperature))
    assert (np.asarray(actual) == NOT_FINITE).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "sampling.temperature: must be 0 .* or positive, got -1.0"),
        ({"temperature": float("nan")}, "sampling.temperature: expected a finite number"),
        ({"temperature": 1, "top_k": 0}, "sampling.top_k: must be a positive whole number"),
        ({"temperature": 1, "top_p": 0.0}, "sampling.top_p: must be above 0 and at most 1"),
        ({"temperature": 1, "top_p": 1.5}, "sampling.top_p: must be above 0 and at most 1"),
        ({"temperature": 1, "min_p": -0.1}, "sampling.min_p: must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty: must be positive"),
        ({"top_p": 0.9}, "sampling.top_p: has no effect with temperature 0"),
        ({"top_k": 3}, "sampling.top_k: has no effect with temperature 0"),
        ({"min_p": 0.1}, "sampling.min_p: has no effect with temperature 0"),
        ({"temprature": 1}, "sampling.temprature: unknown field; did you mean 'temperature'"),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        parse(SamplingConfig, fields, "sampling")


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", "hot"), ("top_k", 2.5), ("top_p", None), ("min_p", True)]
)
def test_values_of_the_wrong_type(field, value):
    with pytest.raises(UserError, match=f"{field}: must be a"):
        SamplingConfig(**{"temperature": 1.0, field: value})
