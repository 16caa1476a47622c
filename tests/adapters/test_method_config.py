"""Configurations of the methods: refusals and derived values."""

import dataclasses
from typing import Any

import pytest
import tiny_program

from moe_jax.adapters import METHODS, LoraConfig, MixLoraConfig
from moe_jax.adapters.lora.lora import Lora
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.mixlora import MixLoraFFN
from moe_jax.adapters.routing import TopKRouter
from moe_jax.config.parse import parse
from moe_jax.errors import ConfigError

LORA = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj"]}
MIXLORA = {**LORA, "target_modules": ["q_proj", "up_proj"], "num_experts": 4}


def test_the_registry():
    assert {"lora": LoraConfig, "mixlora": MixLoraConfig}.items() <= METHODS.items()
    assert all(issubclass(method, AdapterMethod) for method in METHODS.values())


SHARED: list[tuple[str, Any, str]] = [
    ("rank", 0, "must be positive"),
    ("rank", -2, "must be positive"),
    ("alpha", 0.0, "must be positive"),
    ("dropout", 1.0, "must lie in [0, 1)"),
    ("dropout", -0.1, "must lie in [0, 1)"),
    ("target_modules", (), "names no module"),
    (
        "target_modules",
        ("q_porj",),
        "'q_porj' matches no module of the model; did you mean 'q_proj'",
    ),
    ("target_modules", ("w1",), "'w1' matches no module of the model; known: down_proj, gate_proj"),
    ("init", "normal", "not one of 'kaiming', 'gaussian'"),
]
MIXLORA_ONLY: list[tuple[str, Any, str]] = [
    ("target_modules", ("q_proj", "o_proj"), "MixLoRA needs at least one of gate_proj, up_proj"),
    ("num_experts", 1, "must be at least 2; for one use 'lora'"),
    ("ffn_dropout", 1.0, "must lie in [0, 1)"),
    ("ffn_dropout", -0.1, "must lie in [0, 1)"),
    ("router", None, "expected a group of fields, got None"),
    ("losses", [], "expected a group of fields"),
]


@pytest.mark.parametrize(
    ("method", "field", "value", "reason"),
    [
        *((LoraConfig, *case) for case in SHARED),
        *((MixLoraConfig, *case) for case in SHARED + MIXLORA_ONLY),
    ],
)
def test_refusals(method, field, value, reason):
    raw = {**(LORA if method is LoraConfig else MIXLORA), field: value}
    with pytest.raises(ConfigError) as error:
        parse(method, raw, "config.adapters.a.method")
    assert str(error.value).startswith(f"config.adapters.a.method.{field}: ")
    assert reason in str(error.value)


TOP_K = {"name": "top_k"}


@pytest.mark.parametrize(
    ("field", "fields", "message"),
    [
        ("expert_lora", {"rank": 0}, "expert_lora.rank: must be positive"),
        ("expert_lora", {"alpha": 0.0}, "expert_lora.alpha: must be positive"),
        ("expert_lora", {"dropout": 1.0}, "expert_lora.dropout: must lie in [0, 1)"),
        ("router", {**TOP_K, "top_k": 0}, "router.top_k: must be positive"),
        ("router", {**TOP_K, "top_k": 5}, "router.top_k: 5 experts per token, but there are only"),
        ("router", {**TOP_K, "init_std": 0.0}, "router.init_std: must be positive"),
        ("router", {**TOP_K, "jitter_noise": 1.0}, "router.jitter_noise: must lie in [0, 1)"),
        ("router", {**TOP_K, "jitter_noise": -0.1}, "router.jitter_noise: must lie in [0, 1)"),
        ("router", {"top_k": 2}, "router.name: this field is required"),
        (
            "losses",
            {"router_z": {"coefficient": -0.1}},
            "losses.router_z.coefficient: must not be negative",
        ),
        ("losses", {"router_z": {}}, "losses.router_z.coefficient: this field is required"),
        (
            "losses",
            {"balance": {"coefficient": 0.1}},
            "losses.balance.name: unknown loss 'balance'; did you mean 'load_balance'",
        ),
    ],
)
def test_refusals_within_groups(field, fields, message):
    with pytest.raises(ConfigError) as error:
        parse(MixLoraConfig, {**MIXLORA, field: fields})
    assert str(error.value).startswith(f"config.{message}")


def test_the_scale_of_a_pair():
    # alpha / rank is 8 / 4, and alpha / sqrt(rank) is 8 / 2.
    assert parse(LoraConfig, LORA).scale == 2.0
    assert parse(LoraConfig, {**LORA, "rslora": True}).scale == 4.0


def _experts(**fields):
    return parse(MixLoraConfig, {**MIXLORA, "dropout": 0.1, **fields}).expert_low_rank


def test_experts_take_the_common_values_unless_told_otherwise():
    common = LowRankConfig(rank=4, alpha=8.0, dropout=0.1)
    assert _experts() == common
    # The scale of a rank of their own is the common alpha over it: 8 / 16.
    rank_only = _experts(expert_lora={"rank": 16})
    assert rank_only == dataclasses.replace(common, rank=16) and rank_only.scale == 0.5
    assert _experts(expert_lora={"rank": 2, "alpha": 3.0, "dropout": 0.0}) == LowRankConfig(
        rank=2, alpha=3.0, dropout=0.0
    )
    # What is switched on for all can be switched off for experts, and the other way round.
    switches = {"rslora": True, "dora": True, "init": "gaussian"}
    assert _experts(**switches) == dataclasses.replace(common, **switches)
    off = _experts(**switches, expert_lora={"rslora": False, "dora": False})
    assert off == dataclasses.replace(common, init="gaussian")
    on = parse(MixLoraConfig, {**MIXLORA, "expert_lora": {"dora": True}})
    assert on.expert_low_rank.dora and not on.low_rank.dora


def test_without_a_router_it_is_the_papers():
    assert parse(MixLoraConfig, MIXLORA).router == TopKRouter(top_k=2)


def test_only_targeted_projections_are_adapted():
    axes = ("embed", "heads")
    lora, mixlora = parse(LoraConfig, LORA), parse(MixLoraConfig, MIXLORA)
    for method in (lora, mixlora):
        assert isinstance(method.projection_adapter("q_proj", axes), Lora)
        assert method.projection_adapter("k_proj", axes) is None
    # The experts take the FFN as a whole.
    assert mixlora.projection_adapter("up_proj", axes) is None
    assert isinstance(mixlora.mlp_adapter(), MixLoraFFN)
    assert lora.mlp_adapter() is None
    assert (lora.routes, mixlora.routes) == (False, True)
    assert lora.router_losses == {}


def test_untargeted_sites_have_no_leaves():
    method = {**tiny_program.MIXLORA, "target_modules": ("v_proj", "down_proj")}
    tree = tiny_program.program({"x": method}).abstract_state.adapters["x"]["layers"]
    assert set(tree["self_attn"]) == {"v_proj"}
    assert set(tree["mlp"]) == {"moe"}
    assert set(tree["mlp"]["moe"]) == {"router", "down_proj"}


@pytest.mark.parametrize("label", ["loss", "grad_norm", "tokens", "mean_entropy", "a/b"])
def test_a_loss_cannot_have_the_name_of_another_metric(label):
    losses = {label: {"name": "load_balance", "coefficient": 0.1}}
    with pytest.raises(ConfigError) as error:
        parse(MixLoraConfig, {**MIXLORA, "losses": losses})
    assert str(error.value).startswith(f"config.losses.{label}: is the name of another metric")
