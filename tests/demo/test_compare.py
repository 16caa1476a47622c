"""The comparison of two methods: figures by hand and by scipy, and equal conditions."""

import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from moe_jax.adapters import METHODS
from moe_jax.config.run import parse_run_config
from moe_jax.data.pipeline import load_train_data
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.demo.compare import Comparison, MethodScores, Spread, p_value, spread, verdict
from moe_jax.demo.corpus import write_corpus
from moe_jax.demo.score import AnswerScore
from moe_jax.hf.config import read_model_config
from moe_jax.training.records.plan import parameter_count
from moe_jax.training.step.program import build_program


def method_scores(method, table):
    """Scores from `{seed: {task: (exact, loss)}}`, with two questions each."""
    scores = {
        seed: {task: AnswerScore(2, exact, loss, None) for task, (exact, loss) in tasks.items()}
        for seed, tasks in table.items()
    }
    return MethodScores(method, 100, 1e-3, scores)


@pytest.fixture
def comparison():
    first = {4: {"a": (0.5, 1.0), "b": (1.0, 0.2)}, 3: {"a": (0.0, 3.0), "b": (1.0, 0.4)}}
    second = {3: {"a": (0.5, 2.0), "b": (0.5, 0.4)}, 4: {"a": (0.5, 2.0), "b": (0.0, 0.6)}}
    return Comparison(
        method_scores("mixlora", first), method_scores("lora", second), steps=7, rows=5
    )


def test_figures_by_hand(comparison):
    # Seeds in order, 3 then 4, whichever way they came.
    assert comparison.first.values("exact") == {
        "a": [0.0, 0.5],
        "b": [1.0, 1.0],
        "all": [0.5, 0.75],
    }
    assert comparison.second.values("loss")["all"] == pytest.approx([1.2, 1.3])
    assert comparison.differences("exact") == {"a": [-0.5, 0.0], "b": [0.5, 1.0], "all": [0.0, 0.5]}
    # (3.0 + 0.4) / 2 - 1.2 and (1.0 + 0.2) / 2 - 1.3.
    assert comparison.differences("loss")["all"] == pytest.approx([0.5, -0.7])
    # Deviations over two values: their distance over the square root of 2.
    assert spread([0.0, 0.5]) == pytest.approx(Spread(0.25, 0.5 / math.sqrt(2)))


def test_table_and_json_say_the_same(comparison, tmp_path):
    lines = comparison.lines()
    # 25 % and 50 %, with deviations of 35.4 and 0 points; -25 with one of 35.4.
    (row,) = [line for line in lines if line.startswith("a ") and "-25.0" in line]
    assert row.split() == ["a", "25.0", "±", "35.4", "50.0", "±", "0.0", "-25.0", "±", "35.4"]
    comparison.write(tmp_path / "comparison.json")
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [method["method"] for method in written["methods"]] == ["mixlora", "lora"]
    assert written["methods"][0]["seeds"]["4"]["b"] == {"questions": 2, "exact": 1.0, "loss": 0.2}
    assert written["differences"]["exact"]["a"]["mean"] == -0.25
    assert all(said in " ".join(lines) for said in written["verdicts"])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_p_value_matches_scipy(count):
    rng = np.random.default_rng(count)
    first, second = rng.normal(size=count) + 0.8, rng.normal(size=count)
    expected = scipy.stats.ttest_rel(first, second).pvalue
    assert 0.01 < expected < 0.99
    assert p_value(list(first - second)) == pytest.approx(expected, abs=1e-5)


def test_p_value_without_spread():
    assert p_value([0.0, 0.0, 0.0]) == 1.0
    assert p_value([0.25, 0.25]) == 0.0
    with pytest.raises(ValueError, match="two pairs"):
        p_value([1.0])


def test_verdict_follows_the_figures():
    # Mean 1, deviation 1: standard error 0.58, t = 1.73 with 2 degrees of freedom.
    said = verdict("A", "B", "Loss", "nats", 2, [0.0, 1.0, 2.0])
    assert said == (
        "Loss: A minus B is +1.00 nats, standard error 0.58 (3 pairs, t-test p = 0.23): "
        "not larger than the variation over seeds."
    )
    # t = 17.3: p = 0.0033.
    said = verdict("A", "B", "Loss", "nats", 1, [-0.9, -1.0, -1.1])
    assert "is -1.0 nats" in said and "p = 0.0033" in said
    assert ": larger than the variation over seeds" in said


@pytest.fixture(scope="module")
def config():
    raw = importlib.import_module("configs.tiny_comparison").get_config().to_dict()
    return parse_run_config(raw, METHODS)


def test_equal_numbers_of_trainable_parameters(config):
    program = build_program(
        config, read_model_config(config.base.path), dict.fromkeys(config.adapters, 1)
    )
    counts = {n: parameter_count(t) for n, t in program.abstract_state.adapters.items()}
    # 4 layers: 2,336 weights for each unit of LoRA's rank; MixLoRA's attention has rank 8, its four
    # experts have 8 times 1,440 each, and its router is 128 x 4.
    assert {n: counts[n] for n in ("mixlora-0", "lora-0")} == {
        "mixlora-0": 4 * (896 * 8 + 4 * 8 * 1440 + 512),
        "lora-0": 4 * 2336 * 23,
    }
    assert counts["lora-0"] == pytest.approx(counts["mixlora-0"], rel=1e-3)


def test_pairs_differ_in_method_and_rate_only(config):
    for seed in (0, 1, 2):
        first, second = config.adapters[f"mixlora-{seed}"], config.adapters[f"lora-{seed}"]
        rate = first.optimizer.learning_rate
        optimizer = replace(second.optimizer, learning_rate=rate)
        assert first == replace(second, method=first.method, optimizer=optimizer)
        assert second.method.scale == first.method.scale


def test_pairs_read_the_same_rows(config, tmp_path):
    write_corpus(tmp_path, 0)
    tokenizer = load_tokenizer(config.base.path)
    seen = {}
    for name in ("mixlora-0", "lora-0", "lora-1"):
        data = config.adapters[name].data
        source = replace(data.train["tasks"], path=str(tmp_path / "train.jsonl"))
        data = replace(data, train={"tasks": source})
        loaded = load_train_data(data, tokenizer, 16, config.seed(name), name)
        seen[name] = [next(loaded.iterator) for _ in range(3)]
    for ours, theirs, other in zip(seen["mixlora-0"], seen["lora-0"], seen["lora-1"], strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert not np.array_equal(ours.tokens, other.tokens)
