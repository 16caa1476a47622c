"""Ranks as `match:NAME` or `parameters:N`, and alpha as a multiple, before a base is known."""

import json
from typing import Any

import pytest

from moe_jax.adapters import METHODS
from moe_jax.config.rank_match import MatchedMethod
from moe_jax.config.run import RunConfig, parse_run_config, to_json
from moe_jax.errors import ConfigError

MIXLORA = {"name": "mixlora", "rank": 4, "alpha": 8.0, "num_experts": 4}
LORA = {"name": "lora", "rank": "match:mix", "alpha": "2*rank"}
DATA = {"train": {"rows": {"path": "rows.jsonl", "schema": "text"}}, "max_length": 64}


def parsed(methods: dict[str, Any], **fields: Any) -> RunConfig:
    adapters = {
        name: {
            "method": {"target_modules": ["up_proj"], **method},
            "data": DATA,
            "optimizer": {"learning_rate": 1e-3},
            "batch_size": 8,
        }
        for name, method in methods.items()
    }
    raw = {
        "base": {"path": "llama", "param_dtype": "bfloat16"},
        "compute": {"dtype": "bfloat16"},
        "adapters": adapters,
        "training": {"steps": 10},
        **fields,
    }
    return parse_run_config(raw, METHODS)


def test_the_written_configuration_keeps_what_was_asked():
    config = parsed({"mix": MIXLORA, "lora": LORA})
    written = json.loads(to_json(config))
    method = written["adapters"]["lora"]["method"]
    assert (method["rank"], method["alpha"]) == ("match:mix", "2*rank")
    assert method["dropout"] == 0.0  # with the defaults of the other fields
    assert parse_run_config(written, METHODS) == config
    assert config != parsed({"mix": MIXLORA, "lora": {**LORA, "alpha": 2.0}})


@pytest.mark.parametrize(
    ("rank", "alpha", "expected"), [(8, "2*rank", 16.0), (8, "0.5 * rank", 4.0), (8, 3, 3.0)]
)
def test_alpha_is_a_number_or_a_multiple_of_the_rank(rank, alpha, expected):
    lora = {"name": "lora", "rank": rank, "alpha": alpha}
    assert parsed({"lora": lora}).methods["lora"].alpha == expected


def test_alpha_follows_a_swept_rank():
    lora = {"name": "lora", "rank": 4, "alpha": "2*rank"}
    config = parsed({"lora": lora}, sweep={"grid": {"method.rank": (4, 16)}})
    assert [method.alpha for method in config.methods.values()] == [8.0, 32.0]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"mix": MIXLORA, "lora": {**LORA, "rank": "match:mxi"}},
            r"adapters\.lora\.method\.rank: this run has no adapter 'mxi'; did you mean 'mix'",
        ),
        (
            {"lora": {**LORA, "rank": "match:lora"}},
            r"config\.adapters\.lora\.method\.rank: 'lora' matches 'lora'; give one of them",
        ),
        (
            {"a": {**LORA, "rank": "match:b"}, "b": {**LORA, "rank": "match:a"}},
            r"config\.adapters\.a\.method\.rank: 'a' matches 'b' matches 'a'; give one of them",
        ),
        (  # the first adapter leads into a circle without being part of it
            {name: {**LORA, "rank": f"match:{of}"} for name, of in ("ab", "bc", "cb")},
            r"config\.adapters\.b\.method\.rank: 'b' matches 'c' matches 'b'",
        ),
        (
            {"mix": MIXLORA, "lora": {**LORA, "rank": "mix"}},
            r"config\.adapters\.lora\.method\.rank: expected a number, 'match:NAME'",
        ),
        ({"lora": {**LORA, "rank": "match:"}}, "rank: expected a number, 'match:NAME'"),
        ({"lora": {**LORA, "rank": "parameters:0"}}, "rank: expected a number, 'match:NAME'"),
        (
            {"lora": {**LORA, "rank": 8, "alpha": "twice"}},
            r"config\.adapters\.lora\.method\.alpha: expected a number or a multiple of the rank",
        ),
        (  # the other fields are checked although the rank is unknown
            {"mix": MIXLORA, "lora": {**LORA, "dropuot": 0.1}},
            r"config\.adapters\.lora\.method\.dropuot: unknown field; did you mean 'dropout'",
        ),
    ],
)
def test_refusals(methods, message):
    with pytest.raises(ConfigError, match=message) as error:
        parsed(methods)
    assert "\n" not in str(error.value)


def test_an_adapter_left_out_by_train_only_is_not_in_the_run():
    message = (
        r"config\.adapters\.lora\.method\.rank: match:mix is the size of an adapter that "
        r"config\.train_only leaves out; add 'mix' to train_only, or give a number"
    )
    with pytest.raises(ConfigError, match=message):
        parsed({"mix": MIXLORA, "lora": LORA}, train_only="lora")
    both = parsed({"mix": MIXLORA, "lora": LORA, "x": MIXLORA}, train_only=("lora", "mix"))
    assert list(both.methods) == ["mix", "lora"]


def test_swept_adapters_match_as_their_template_does():
    grid = {"grid": {"optimizer.learning_rate": (1e-3, 1e-4)}, "adapter": "lora"}
    config = parsed({"mix": MIXLORA, "lora": LORA}, sweep=grid)
    assert list(config.methods) == ["mix", "lora-learning_rate=0.001", "lora-learning_rate=0.0001"]
    matched = list(config.methods.values())[1:]
    assert all(isinstance(method, MatchedMethod) and method.adapter == "mix" for method in matched)


def test_a_swept_template_stands_for_its_first_adapter():
    grid = {"grid": {"optimizer.learning_rate": (1e-3, 1e-4)}, "adapter": "mix"}
    config = parsed({"mix": MIXLORA, "lora": LORA}, sweep=grid)
    assert config.methods["lora"].adapter == "mix-learning_rate=0.001"


def test_a_template_whose_method_is_swept_is_refused():
    grid = {"grid": {"method.rank": (4, 8)}, "adapter": "mix"}
    message = "the sweep over 'mix' changes its method; name one of its adapters, such as"
    with pytest.raises(ConfigError, match=f"rank: {message} 'mix-rank=4'"):
        parsed({"mix": MIXLORA, "lora": LORA}, sweep=grid)
