"""Configurations of preference training that are refused, with the field."""

from typing import Any

import pytest

from moe_jax.adapters import METHODS
from moe_jax.config.run import parse_run_config
from moe_jax.errors import ConfigError

LORA = {"name": "lora", "rank": 2, "alpha": 4.0, "target_modules": ("q_proj",)}


def parsed(preference: Any, data: dict | None = None, schema: str | None = None, **fields: Any):
    adapter = {
        "method": LORA,
        "data": {"train": {"x": {"path": "x", "schema": schema}}, "max_length": 8, **(data or {})},
        "optimizer": {"learning_rate": 1e-3},
        "batch_size": 8,
        "preference": preference,
        **fields,
    }
    raw = {
        "base": {"path": "base", "param_dtype": "float32"},
        "compute": {"dtype": "float32"},
        "adapters": {"a": adapter},
        "training": {"steps": 1, "micro_batches": 2},
    }
    return parse_run_config(raw, METHODS)


def test_losses_have_their_own_defaults():
    found = {
        name: parsed({"name": name}).preferences["a"] for name in ("dpo", "orpo", "simpo", "kto")
    }
    assert {name: (loss.beta, loss.sft_weight) for name, loss in found.items()} == {
        "dpo": (0.1, 0.0),
        "orpo": (0.1, 1.0),
        "simpo": (2.0, 0.0),
        "kto": (0.1, 0.0),
    }
    assert found["kto"].schema == "feedback"


@pytest.mark.parametrize(
    ("preference", "fields", "expected"),
    [
        ({"name": "dop"}, {}, "preference.name: unknown preference loss 'dop'; did you mean 'dpo'"),
        ({"name": "dpo", "beta": 0.0}, {}, "preference.beta: must be above 0"),
        ({"name": "simpo", "beta": -1.0}, {}, "preference.beta: must be above 0"),
        ({"name": "dpo", "sft_weight": -1.0}, {}, "preference.sft_weight: must not be negative"),
        (
            {"name": "dpo", "label_smoothing": 0.5},
            {},
            r"preference.label_smoothing: must lie in \[0, 0.5\)",
        ),
        (
            {"name": "dpo", "label_smoothing": 0.1, "loss_type": "ipo"},
            {},
            "preference.label_smoothing: is for loss_type 'sigmoid', not 'ipo'",
        ),
        ({"name": "simpo", "gamma": -1.0}, {}, "preference.gamma: must not be negative"),
        (
            {"name": "kto", "desirable_weight": 0.0},
            {},
            "preference.desirable_weight: must be above 0",
        ),
        ({"name": "orpo", "reference": "base"}, {}, "preference.reference: unknown field"),
        (
            {"name": "dpo", "reference": "start"},
            {},
            "preference.reference: 'start' is the adapter of start_from, which is not given",
        ),
        (
            {"name": "dpo"},
            {"method": {**LORA, "new_tokens": ("<a>",)}},
            "preference.reference: 'base' has no embeddings of method.new_tokens; use 'start'",
        ),
        (
            {"name": "dpo"},
            {"method": {**LORA, "classification": {"labels": ("x", "y")}}, "schema": None},
            "preference: a classifier writes no answers",
        ),
        ({"name": "kto"}, {"batch_size": 2}, "batch_size: 'kto' estimates KL"),
        (
            {"name": "dpo"},
            {"batch_size": 6},
            "batch_size: 6 rows cannot be cut into .* equal parts of whole examples, two rows each",
        ),
        (
            {"name": "dpo"},
            {"data": {"packing": "first_fit"}},
            "data.packing: each answer of preference data has a row of its own",
        ),
        (
            {"name": "dpo"},
            {"data": {"streaming": True}},
            "data.streaming: reads rows one by one, and preference losses need all",
        ),
        (
            {"name": "dpo"},
            {"data": {"train_on_prompt": True}},
            "data.train_on_prompt: preference losses compare answers alone",
        ),
        (
            {"name": "dpo"},
            {"schema": "feedback"},
            "data.train.x.schema: 'feedback', but the preference loss 'dpo' learns rows of",
        ),
        (
            {"name": "kto"},
            {"data": {"train": {"x": {"task": "boolq"}}}},
            "data.train.x.task: 'boolq', but the preference loss 'kto' learns rows of the schema",
        ),
        (
            None,
            {"schema": "preference"},
            "data.train.x.schema: 'preference' needs the adapter's preference, which names the",
        ),
    ],
)
def test_refused(preference, fields, expected):
    with pytest.raises(ConfigError, match=rf"^config\.adapters\.a\.{expected}"):
        parsed(preference, **fields)
