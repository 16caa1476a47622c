"""Configuration of a score head."""

import pytest

from moe_jax.adapters import METHODS
from moe_jax.config.parse import parse_member, to_plain
from moe_jax.config.run import parse_run_config
from moe_jax.errors import ConfigError

LORA = {"name": "lora", "rank": 2, "alpha": 4, "target_modules": ["q_proj"]}


def method(**classification):
    return parse_member(METHODS, {**LORA, "classification": classification}, "method")


@pytest.mark.parametrize(
    ("fields", "labels", "metrics"),
    [
        ({"labels": ["a", "b", "c"]}, ("a", "b", "c"), ("accuracy",)),
        ({"labels": ["a", "b"], "metrics": ["f1"]}, ("a", "b"), ("f1",)),
        ({"regression": True}, (), ("pearson", "spearman")),
        ({"glue": "cola"}, ("unacceptable", "acceptable"), ("matthews",)),
        ({"glue": "stsb"}, (), ("pearson", "spearman")),
    ],
)
def test_defaults_follow_from_the_given_fields(fields, labels, metrics):
    found = method(**fields)
    own = found.classification
    assert (own.labels, own.metrics) == (labels, metrics)
    assert own.regression == (not labels)
    assert own.num_scores == (len(labels) or 1)
    # As `config.json` and `adapter.json` have it.
    assert parse_member(METHODS, to_plain(found), "method") == found


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "labels: give one of labels, glue and regression=True"),
        ({"labels": ["a"]}, "labels: give at least two"),
        ({"labels": ["a", "a"]}, "labels: names a label twice"),
        ({"labels": ["a", " "]}, "labels: names a blank label"),
        ({"labels": ["a", "b"], "regression": True}, "labels: give one of labels, glue and"),
        ({"glue": "sst"}, "glue: 'sst' is not one of"),
        ({"glue": "sst2", "labels": ["bad", "good"]}, "those of sst2 are negative, positive"),
        ({"glue": "sst2", "regression": True}, "regression: sst2 has labels"),
        ({"labels": ["a", "b", "c"], "metrics": ["f1"]}, "metrics: f1 is for two labels only"),
        ({"labels": ["a", "b"], "metrics": ["pearson"]}, "metrics: pearson is for numbers"),
        ({"regression": True, "metrics": ["accuracy"]}, "metrics: accuracy is for labels"),
        ({"label": ["a", "b"]}, "label: unknown field; did you mean 'labels'"),
    ],
)
def test_inconsistent_fields_are_refused(fields, words):
    with pytest.raises(ConfigError) as error:
        method(**fields)
    assert str(error.value).startswith("method.classification")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("own", "fields", "words"),
    [
        (
            {**LORA, "classification": {"glue": "sst2"}},
            {"data": {"train": {"x": {"path": "x", "schema": "text"}}, "max_length": 8}},
            "adapters.a.data.train.x.schema: 'text', but method.classification learns rows",
        ),
        (
            {**LORA, "classification": {"glue": "sst2"}},
            {
                "data": {
                    "train": {"x": {"path": "x", "schema": "classification"}},
                    "max_length": 8,
                    "packing": "first_fit",
                }
            },
            "adapters.a.data.packing: a classifier has one answer for each row",
        ),
        (
            LORA,
            {"data": {"train": {"x": {"path": "x", "schema": "classification"}}, "max_length": 8}},
            "adapters.a.data.train.x.schema: 'classification' needs method.classification",
        ),
        (
            {**LORA, "classification": {"glue": "sst2"}},
            {"evaluation": {"tasks": ["boolq"]}},
            "adapters.a.evaluation: a classifier answers no questions",
        ),
    ],
)
def test_data_and_evaluation_must_fit_the_head(own, fields, words):
    data = {"train": {"x": {"task": "sst2"}}, "max_length": 8}
    adapter = {
        "method": own,
        "data": data,
        "optimizer": {"learning_rate": 1e-3},
        "batch_size": 2,
        **fields,
    }
    raw = {
        "base": {"path": "x", "param_dtype": "float32"},
        "compute": {"dtype": "float32"},
        "adapters": {"a": adapter},
        "training": {"steps": 1},
    }
    with pytest.raises(ConfigError) as error:
        parse_run_config(raw, METHODS)
    assert f"config.{words}" in str(error.value)
