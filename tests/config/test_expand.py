"""A sweep becomes adapters before the configuration is parsed."""

import copy
import itertools
import json
from typing import Any

import ml_collections
import pytest

import moe_jax
from moe_jax.adapters import METHODS, LoraConfig
from moe_jax.config.command_line import apply_overrides
from moe_jax.config.run import RunConfig, parse_run_config, to_json
from moe_jax.errors import ConfigError

ADAPTER: dict[str, Any] = {
    "method": {
        "name": "mixlora",
        "rank": 8,
        "alpha": 16,
        "target_modules": ["q_proj", "up_proj"],
        "num_experts": 4,
        "router": {"name": "top_k", "top_k": 2},
        "losses": {"load_balance": {"coefficient": 0.01}},
    },
    "data": {
        "train": {"rows": {"path": "rows.jsonl", "schema": "instruction"}},
        "max_length": 64,
    },
    "optimizer": {"learning_rate": 1e-3},
    "batch_size": 8,
}
OTHER: dict[str, Any] = {**ADAPTER, "seed": 7}
GRID = {"optimizer.learning_rate": (1e-4, 3e-4), "method.rank": (4, 8), "seed": (0, 1)}


def raw(grid: Any, adapter: str | None = "default", **adapters: Any) -> dict[str, Any]:
    return {
        "base": {"path": "llama", "param_dtype": "bfloat16"},
        "compute": {"dtype": "bfloat16"},
        "adapters": {"default": ADAPTER, **adapters},
        "training": {"steps": 10},
        "sweep": {"adapter": adapter, "grid": grid},
    }


def parsed(grid: Any, adapter: str | None = "default", **adapters: Any) -> RunConfig:
    return parse_run_config(raw(grid, adapter, **adapters), METHODS)


def test_every_combination_is_an_adapter_and_the_template_is_removed():
    given = raw(GRID, after=OTHER)
    given["adapters"] = {"before": OTHER, **given["adapters"]}
    before = copy.deepcopy(given)
    config = parse_run_config(given, METHODS)
    assert given == before
    names = list(config.adapters)
    assert (names[0], names[-1]) == ("before", "after")
    assert names[1:3] == [
        "default-learning_rate=0.0001-rank=4-seed=0",
        "default-learning_rate=0.0001-rank=4-seed=1",
    ]
    found = [
        (adapter.optimizer.learning_rate, adapter.method.rank, adapter.seed)
        for name, adapter in config.adapters.items()
        if name.startswith("default")
    ]
    assert found == list(itertools.product((1e-4, 3e-4), (4, 8), (0, 1)))
    # All other fields equal the template's.
    assert all(adapter.method.alpha == 16.0 for adapter in config.adapters.values())
    assert config.adapters["before"].method.rank == 8


def test_recorded_configuration_is_expanded():
    config = parsed(GRID)
    recorded = json.loads(to_json(config))
    assert "sweep" not in recorded
    assert len(recorded["adapters"]) == 8
    assert parse_run_config(recorded, METHODS) == config


def test_nested_groups_equal_dotted_names():
    nested = {"optimizer": {"learning_rate": (1e-4, 3e-4)}, "method": {"rank": (4, 8)}}
    nested["seed"] = (0, 1)
    assert parsed(nested) == parsed(GRID)
    # Names in ConfigDicts cannot hold dots, and ConfigDicts sort their fields.
    config = moe_jax.parse_config(ml_collections.ConfigDict(raw(nested)))
    by_name = parsed({field: GRID[field] for field in sorted(GRID)})
    assert config == by_name
    assert "default-rank=4-learning_rate=0.0003-seed=1" in config.adapters


def test_single_adapter_needs_no_name():
    assert parsed({"seed": (0, 1)}, None) == parsed({"seed": (0, 1)})


def test_no_sweep():
    given = raw({})
    given["sweep"] = None
    assert list(parse_run_config(given, METHODS).adapters) == ["default"]


@pytest.mark.parametrize(
    ("grid", "names"),
    [
        ({"optimizer.clip_norm": (None, 1.0)}, ["clip_norm=None", "clip_norm=1.0"]),
        ({"optimizer.learning_rate": [1e-5]}, ["learning_rate=1e-05"]),
        ({"method.dora": (True, False)}, ["dora=True", "dora=False"]),
        (
            {"method.target_modules": (("q_proj", "up_proj"), ("up_proj",))},
            ["target_modules=q_proj+up_proj", "target_modules=up_proj"],
        ),
        # Parts are added until the fields differ.
        (
            {"method.rank": (4,), "method.expert_lora.rank": (2, 3)},
            ["method.rank=4-expert_lora.rank=2", "method.rank=4-expert_lora.rank=3"],
        ),
        ({"data.train.rows.path": ("a/b.jsonl", "c d")}, ["path=a_b.jsonl", "path=c_d"]),
        ({"method.losses.load_balance.coefficient": (0.1,)}, ["coefficient=0.1"]),
        # A value can be a group of fields with a name.
        (
            {"method.router": ({"name": "top_k", "top_k": 1}, {"name": "soft"})},
            ["router=top_k", "router=soft"],
        ),
    ],
)
def test_names(grid, names):
    assert list(parsed(grid).adapters) == [f"default-{name}" for name in names]


def test_groups_that_the_template_leaves_out():
    ranks = {
        name: a.method.expert_low_rank.rank
        for name, a in parsed({"method.expert_lora.rank": (2, 3)}).adapters.items()
    }
    assert ranks == {"default-rank=2": 2, "default-rank=3": 3}


def test_methods_made_in_python():
    method = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))
    config = parsed({"method.rank": (1, 2)}, "plain", plain={**ADAPTER, "method": method})
    assert config.adapters["plain-rank=2"].method == method
    assert config.adapters["plain-rank=1"].method.rank == 1


REFUSED = {
    "grid.optimizer.learning_rat": (
        {"optimizer.learning_rat": (1,)},
        "did you mean 'learning_rate'?",
    ),
    "grid.optimiser.learning_rate": (
        {"optimiser.learning_rate": (1,)},
        "did you mean 'optimizer'?",
    ),
    "grid.method.rnk": ({"method.rnk": (1,)}, "unknown field 'rnk'; did you mean 'rank'?"),
    "grid.method.router.tok_k": ({"method.router.tok_k": (1,)}, "did you mean 'top_k'?"),
    "grid.method.losses.load_balance.x": ({"method.losses.load_balance.x": (1,)}, "unknown field"),
    "grid.seed.x": ({"seed.x": (1,)}, "'x' would be a field of a single value"),
    "grid.seed": ({"seed": ()}, "names no value"),
    "grid.batch_size": ({"batch_size": 3}, "expected a tuple of values, got 3"),
    "grid.method": ({"method": ({"rank": 3},)}, "a group of fields without a name"),
}


def refusal(given: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse_run_config(given, METHODS)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("field", "case"), REFUSED.items())
def test_invalid_fields_of_a_grid(field, case):
    grid, reason = case
    error = refusal(raw(grid))
    assert error.startswith(f"config.sweep.{field}: ")
    assert reason in error


def test_invalid_grids():
    assert refusal(raw({})).startswith("config.sweep.grid: names no field")
    assert "grid: expected a group of fields" in refusal(raw((1, 2)))
    many = {"seed": tuple(range(13)), "batch_size": (1, 2, 3, 4, 5)}
    assert "config.sweep.grid: 13 x 5 = 65 adapters, more than 64" in refusal(raw(many))
    assert len(parsed({"seed": tuple(range(64))}).adapters) == 64
    unknown = {**raw(GRID), "sweep": {"adapter": "default", "gird": GRID}}
    assert refusal(unknown).startswith("config.sweep.gird: unknown field; did you mean 'grid'?")


def test_a_field_given_twice():
    twice = {"batch_size": (1, 2), "optimizer.learning_rate": (0.1,), "optimizer": {}}
    twice["optimizer"]["learning_rate"] = (0.2,)
    error = refusal(raw(twice))
    assert error.startswith("config.sweep.grid.optimizer.learning_rate: is given twice")


def test_names_that_collide():
    twice = refusal(raw({"seed": (1, 2, 1)}))
    assert twice.startswith("config.sweep.grid: makes the adapter 'default-seed=1', which already")
    taken = raw({"seed": (1, 2)}, **{"default-seed=2": OTHER})
    assert "makes the adapter 'default-seed=2', which already exists" in refusal(taken)
    paths = raw({"data.train.rows.path": ("a/b", "a b")})
    assert "makes the adapter 'default-path=a_b'" in refusal(paths)


def test_unknown_adapters():
    assert refusal(raw(GRID, "defualt")) == (
        "config.sweep.adapter: unknown adapter 'defualt'; did you mean 'default'?"
    )
    assert refusal(raw(GRID, None, other=OTHER)) == (
        "config.sweep.adapter: is not given; known: default, other"
    )


def test_values_of_a_grid_are_checked():
    error = refusal(raw({"method.rank": (4, 0)}))
    assert error == "config.adapters.default-rank=0.method.rank: must be positive"


def test_on_the_command_line():
    given = raw({"optimizer": {"learning_rate": (1.0,)}})
    overrides = {
        "sweep.grid.optimizer.learning_rate": "(1e-4, 3e-4)",
        "sweep.grid.method.rank": "(4, 8)",
        "sweep.grid.seed": "(0, 1)",
        "adapters.default.batch_size": "4",
    }
    apply_overrides(given, overrides)
    config = parse_run_config(given, METHODS)
    assert list(config.adapters) == list(parsed(GRID).adapters)
    assert {adapter.batch_size for adapter in config.adapters.values()} == {4}
    # Without a sweep in the file. An adapter's name is always a string.
    given = raw({})
    given["adapters"] = {"8": ADAPTER}
    del given["sweep"]
    apply_overrides(given, {"sweep.adapter": "8", "sweep.grid": "{'seed': (0, 1)}"})
    assert list(parse_run_config(given, METHODS).adapters) == ["8-seed=0", "8-seed=1"]
    apply_overrides(given, {"sweep": "None"})
    assert list(parse_run_config(given, METHODS).adapters) == ["8"]


def test_names_that_differ_by_case_only():
    given = raw(GRID, None, Default=OTHER)
    given["sweep"] = None
    assert refusal(given).startswith("config.adapters.Default: differs from 'default' in upper and")
