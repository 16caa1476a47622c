"""Configurations and overrides of the command line."""

import json
from typing import Any

from fuzz.inputs import as_python, attempt, fuzz, json_values, mutated, python_values
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.adapters import METHODS
from moe_jax.config.command_line import apply_overrides
from moe_jax.config.run import parse_run_config, to_json


def _adapter(**method: Any) -> dict[str, Any]:
    return {
        "method": {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj", "up_proj"], **method},
        "data": {
            "train": {"rows": {"path": "rows.jsonl", "schema": "chat", "columns": {"system": ""}}},
            "validation": {"held_out": {"path": ["a.csv", "b.csv"], "split": "train[:2%]"}},
            "max_length": 64,
            "buckets": [16, 32],
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-3,
            "schedule": {"kind": "cosine", "warmup_ratio": 0.1},
        },
        "batch_size": 8,
    }


RAW: dict[str, Any] = {
    "base": {
        "path": "llama",
        "param_dtype": "bfloat16",
        "hf_config": {"hidden_size": 8, "rope_scaling": {"type": "linear", "factor": 2.0}},
    },
    "compute": {"dtype": "bfloat16"},
    "adapters": {
        "default": _adapter(
            name="mixlora",
            num_experts=4,
            router={"name": "top_k", "top_k": 2},
            losses={"load_balance": {"coefficient": 0.01}},
        ),
        "other": {**_adapter(name="lora", new_tokens=["<a>"]), "steps": 5},
        "matched": _adapter(name="lora") | {"seed": 3},
    },
    "training": {"steps": 10},
    "mesh": {"data": 1, "fsdp": -1},
    "logging": {"matrix_tflops": 2.0},
    "train_only": ["default", "matched"],
    "sweep": {"grid": {"optimizer.learning_rate": [1e-3, 2e-3]}, "adapter": "default"},
}
RAW["adapters"]["matched"]["method"]["rank"] = "match:default-learning_rate=0.001"
RAW["adapters"]["matched"]["method"]["alpha"] = "2*rank"

_PATHS = st.sampled_from(
    [
        "training.steps",
        "adapters.default.method.rank",
        "adapters.new.method",
        "base.hf_config.x",
        "base",
        "sweep.grid",
        "mesh.data.x",
        "",
        "..",
    ]
)
_LITERALS = st.sampled_from(
    ["{[]: 1}", "(" * 500, "-" * 5000 + "1", "1e999", "10**9", "{1: 2}", "'", "\x00", "9" * 5000]
)


def test_the_input_is_valid():
    config = parse_run_config(RAW, METHODS)

    assert parse_run_config(json.loads(to_json(config)), METHODS) == config


@fuzz(quick=150, share=0.36)
@given(mutated(RAW, python_values))
def test_configuration(raw: Any):
    with attempt("configuration"):
        config = parse_run_config(as_python(raw), METHODS)

        assert to_json(parse_run_config(json.loads(to_json(config)), METHODS)) == to_json(config)


@fuzz(quick=50, share=0.06)
@given(st.dictionaries(_PATHS, _LITERALS | st.text() | json_values.map(str), min_size=1))
def test_overrides(overrides: dict[str, str]):
    raw = json.loads(json.dumps(RAW))

    with attempt("overrides"):
        apply_overrides(raw, overrides)
        parse_run_config(raw, METHODS)
