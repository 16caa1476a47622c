"""What the configurations of the methods refuse, and what follows from them."""

from typing import Any

import pytest
import tiny_program

from moe_jax.adapters import METHODS, LoraConfig, MixLoraConfig
from moe_jax.adapters.lora import Lora
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.mixlora import ExpertLoraConfig, MixLoraMLP
from moe_jax.config.parse import parse
from moe_jax.errors import ConfigError

LORA = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj"]}
MIXLORA = {**LORA, "target_modules": ["q_proj", "up_proj"], "num_experts": 4, "top_k": 2}


def test_the_registry():
    assert {"lora": LoraConfig, "mixlora": MixLoraConfig} == METHODS
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
    ("top_k", 0, "must lie between 1 and num_experts (4)"),
    ("top_k", 5, "must lie between 1 and num_experts (4)"),
    ("router_init_std", 0.0, "must be positive"),
    ("jitter_noise", 1.0, "must lie in [0, 1)"),
    ("jitter_noise", -0.1, "must lie in [0, 1)"),
    ("losses", {"balance": {"coefficient": 0.1}}, "unknown 'balance'; did you mean 'load_balance'"),
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


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        ("expert_lora", "rank", 0),
        ("expert_lora", "alpha", 0.0),
        ("expert_lora", "dropout", 1.0),
        ("losses", "coefficient", -0.1),
    ],
)
def test_refusals_within_groups(group, field, value):
    inner = {field: value}
    where = f"config.{group}.{field}"
    if group == "losses":
        inner, where = {"router_z": inner}, f"config.losses.router_z.{field}"
    with pytest.raises(ConfigError) as error:
        parse(MixLoraConfig, {**MIXLORA, group: inner})
    assert str(error.value).startswith(f"{where}: must ")


def test_experts_take_the_common_values_unless_told_otherwise():
    common = parse(MixLoraConfig, {**MIXLORA, "dropout": 0.1})
    assert (common.expert_rank, common.expert_scale, common.expert_dropout) == (4, 2.0, 0.1)
    # The scale of a rank of their own is the common alpha over it: 8 / 16.
    rank_only = parse(MixLoraConfig, {**MIXLORA, "expert_lora": {"rank": 16}})
    assert (rank_only.expert_rank, rank_only.expert_scale) == (16, 0.5)
    own = parse(
        MixLoraConfig,
        {**MIXLORA, "dropout": 0.1, "expert_lora": {"rank": 2, "alpha": 3.0, "dropout": 0.0}},
    )
    assert (own.expert_rank, own.expert_scale, own.expert_dropout) == (2, 1.5, 0.0)
    assert own.expert_lora == ExpertLoraConfig(rank=2, alpha=3.0, dropout=0.0)


def test_only_targeted_projections_are_adapted():
    axes = ("embed", "heads")
    lora, mixlora = parse(LoraConfig, LORA), parse(MixLoraConfig, MIXLORA)
    for method in (lora, mixlora):
        assert isinstance(method.projection_adapter("q_proj", axes), Lora)
        assert method.projection_adapter("k_proj", axes) is None
    # The experts take the FFN as a whole.
    assert mixlora.projection_adapter("up_proj", axes) is None
    assert isinstance(mixlora.mlp_adapter(), MixLoraMLP)
    assert lora.mlp_adapter() is None
    assert (lora.routes, mixlora.routes) == (False, True)
    assert lora.router_losses == {}


def test_untargeted_sites_have_no_leaves():
    method = {**tiny_program.MIXLORA, "target_modules": ("v_proj", "down_proj")}
    tree = tiny_program.program({"x": method}).abstract_state.adapters["x"]["layers"]
    assert set(tree["self_attn"]) == {"v_proj"}
    assert set(tree["mlp"]) == {"moe"}
    assert set(tree["mlp"]["moe"]) == {"router", "down_proj"}
