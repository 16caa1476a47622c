"""Configuration of a run: refusals of each group, and the round trip through JSON."""

import copy
import json
import re
from typing import Any

import pytest

from moe_jax.adapters import METHODS, LoraConfig, MixLoraConfig
from moe_jax.adapters.mixlora import ExpertLoraConfig
from moe_jax.adapters.routing import TopKRouter
from moe_jax.adapters.routing.losses import LoadBalance
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.config.optimizer import ScheduleConfig
from moe_jax.config.parse import parse
from moe_jax.config.rope import RopeConfig
from moe_jax.config.run import parse_run_config, to_json
from moe_jax.errors import ConfigError

RAW: dict[str, Any] = {
    "base": {"path": "llama", "param_dtype": "bfloat16"},
    "compute": {"dtype": "bfloat16"},
    "adapters": {
        "default": {
            "method": {
                "name": "mixlora",
                "rank": 8,
                "alpha": 16,
                "target_modules": ["q_proj", "up_proj"],
                "num_experts": 4,
                "router": {"name": "top_k", "top_k": 3},
            },
            "data": {
                "train": {"rows": {"path": "rows.jsonl", "schema": "instruction"}},
                "max_length": 64,
            },
            "optimizer": {"learning_rate": 1e-3},
            "batch_size": 8,
        }
    },
    "training": {"steps": 10},
}


def _raw(path: str, value: Any) -> dict[str, Any]:
    """`RAW` with the field at `path` set."""
    raw = copy.deepcopy(RAW)
    node = raw
    *groups, last = path.split(".")
    for name in groups:
        node = node.setdefault(name, {})
    node[last] = value
    return raw


def _without(path: str) -> dict[str, Any]:
    raw = copy.deepcopy(RAW)
    node = raw
    *groups, last = path.split(".")
    for name in groups:
        node = node[name]
    del node[last]
    return raw


def test_a_whole_configuration():
    config = parse_run_config(RAW, METHODS)
    adapter = config.adapters["default"]
    assert adapter.method == MixLoraConfig(
        rank=8,
        alpha=16.0,
        target_modules=("q_proj", "up_proj"),
        num_experts=4,
        router=TopKRouter(top_k=3),
    )
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (-1, 1, 1)
    assert adapter.data.lengths == (64,)
    assert adapter.optimizer.name == "adamw" and adapter.optimizer.clip_norm == 1.0


def test_parsing_does_not_change_what_it_is_given():
    raw = copy.deepcopy(RAW)
    parse_run_config(raw, METHODS)
    assert raw == RAW


ADAPTER = "adapters.default"
REFUSED = {
    # Path of a field, an invalid value, and the reason in the message.
    "base.path": [(None, "expected str, got None")],
    "base.param_dtype": [("float64", "not one of 'float32', 'bfloat16', 'float16'")],
    "base.hf_config": [("config.json", "expected a group of fields")],
    "compute.dtype": [("bf16", "not one of"), ("bfloat61", "did you mean 'bfloat16'?")],
    "compute.attention": [("flash", "not one of 'auto', 'xla', 'cudnn'")],
    "compute.remat": [(True, "not one of 'none', 'dots', 'frozen', 'narrow', 'full'")],
    "mesh.data": [(0, "positive, or -1"), (-2, "positive, or -1"), (2.0, "expected int")],
    "mesh.fsdp": [(0, "positive, or -1")],
    "mesh.tensor": [(-3, "positive, or -1")],
    "training.steps": [(0, "must be positive"), (None, "give either steps or epochs")],
    "training.micro_batches": [(0, "must be positive")],
    "training.log_every": [(0, "must be positive")],
    "training.max_skipped_steps": [(0, "must be positive")],
    "training.eval_every": [
        (-1, "must not be negative; 0 measures only before the first step and after the last"),
        (None, "expected int, got None; 0 measures only before the first step and after the last"),
        ("10", "expected int, got str ('10')"),
    ],
    "training.seed": [(-1, "must not be negative")],
    "training.initial_loss_scale": [(0.5, "must be at least 1")],
    "checkpoints.every": [(0, "must be positive")],
    "checkpoints.minutes": [(-1.0, "must not be negative")],
    "checkpoints.keep": [(0, "must be positive")],
    "logging.tensorboard": [("yes", "expected bool")],
    "adapters": [({}, "names no adapter"), (None, "expected a group of fields")],
    ADAPTER: [(3, "expected a group of fields")],
    f"{ADAPTER}.batch_size": [(0, "must be positive"), (8.0, "expected int")],
    f"{ADAPTER}.method": [("lora", "expected a group of fields"), (None, "group of fields")],
    f"{ADAPTER}.method.name": [("mixlroa", "did you mean 'mixlora'?"), ("dora", "unknown method")],
    f"{ADAPTER}.method.rank": [(0, "must be positive"), (True, "expected int, got bool")],
    f"{ADAPTER}.method.num_expert": [(4, "did you mean 'num_experts'?")],
    f"{ADAPTER}.method.router": [("top_k", "expected a group of fields")],
    f"{ADAPTER}.method.router.name": [
        ("top_kk", "unknown router 'top_kk'; did you mean 'top_k'?"),
        (2, "unknown router 2; known: "),
    ],
    f"{ADAPTER}.method.router.top_k": [(0, "must be positive"), (5, "there are only 4")],
    f"{ADAPTER}.method.router.jitter": [(0.1, "did you mean 'jitter_noise'?")],
    f"{ADAPTER}.data.train": [({}, "names no data set")],
    f"{ADAPTER}.data.max_length": [(1, "at least 2 tokens")],
    f"{ADAPTER}.data.date": [
        ("26 Jul 2024", "as YYYY-MM-DD, got '26 Jul 2024'"),
        ("20240726", "YYYY"),
    ],
    f"{ADAPTER}.data.buckets": [
        ([32, 16], "must ascend strictly"),
        ([16, 16], "must ascend strictly"),
        ([0, 16], "must lie between 1 and max_length (64)"),
        ([16, 65], "must lie between 1 and max_length (64)"),
        (16, "expected a tuple"),
    ],
    f"{ADAPTER}.data.packing": [("best_fit", "not one of 'none', 'first_fit'"), (True, "one of")],
    f"{ADAPTER}.data.sort_window": [(0, "must be positive")],
    f"{ADAPTER}.data.num_workers": [(-1, "must not be negative")],
    f"{ADAPTER}.data.train.rows.path": [
        ("", "is empty"),
        ((), "is empty"),
        (("a.csv", ""), "is empty"),
    ],
    f"{ADAPTER}.data.train.rows.schema": [("instructions", "did you mean 'instruction'?")],
    f"{ADAPTER}.data.train.rows.weight": [(0, "must be positive")],
    f"{ADAPTER}.data.train.rows.columns.text": [(3, "expected str")],
    f"{ADAPTER}.optimizer.name": [("adam", "did you mean 'adamw'?")],
    f"{ADAPTER}.optimizer.learning_rate": [
        (0.0, "must be positive"),
        (float("nan"), "expected a finite number"),
        ("1e-3", "expected float, got str"),
    ],
    f"{ADAPTER}.optimizer.weight_decay": [(-0.1, "must not be negative")],
    f"{ADAPTER}.optimizer.b1": [(1.0, "must lie in [0, 1)")],
    f"{ADAPTER}.optimizer.b2": [(-0.1, "must lie in [0, 1)")],
    f"{ADAPTER}.optimizer.momentum": [(1.0, "must lie in [0, 1)")],
    f"{ADAPTER}.optimizer.eps": [(0.0, "must be positive")],
    f"{ADAPTER}.optimizer.clip_norm": [(0.0, "must be positive or None")],
    f"{ADAPTER}.optimizer.schedule.kind": [("cosinus", "did you mean 'cosine'?")],
    f"{ADAPTER}.optimizer.schedule.warmup_steps": [(-1, "must not be negative")],
    f"{ADAPTER}.optimizer.schedule.warmup_ratio": [(1.0, "[0, 1)"), (-0.1, "[0, 1)")],
    f"{ADAPTER}.optimizer.schedule.final_fraction": [(1.5, "[0, 1]"), (-0.1, "[0, 1]")],
}


@pytest.mark.parametrize(
    ("path", "value", "reason"), [(p, *c) for p, cs in REFUSED.items() for c in cs]
)
def test_refusals(path, value, reason):
    with pytest.raises(ConfigError) as error:
        parse_run_config(_raw(path, value), METHODS)
    assert str(error.value).startswith(f"config.{path}: ")
    assert reason in str(error.value)


@pytest.mark.parametrize("every", [None, -1])
def test_message_names_the_value_that_switches_evaluation_off(every):
    own = {"tasks": ["boolq"], "every": every}
    with pytest.raises(ConfigError, match=r"evaluation\.every: .*; 0 measures at the end only"):
        parse_run_config(_raw(f"{ADAPTER}.evaluation", own), METHODS)


@pytest.mark.parametrize(
    "path",
    [
        "base",
        "base.path",
        "base.param_dtype",
        "compute.dtype",
        "adapters",
        "training",
        f"{ADAPTER}.method",
        f"{ADAPTER}.method.alpha",
        f"{ADAPTER}.method.num_experts",
        f"{ADAPTER}.data",
        f"{ADAPTER}.data.max_length",
        f"{ADAPTER}.optimizer.learning_rate",
        f"{ADAPTER}.batch_size",
    ],
)
def test_required_fields(path):
    with pytest.raises(ConfigError) as error:
        parse_run_config(_without(path), METHODS)
    assert str(error.value) == f"config.{path}: this field is required and was not given"


@pytest.mark.parametrize(
    ("group", "known"), [("method", "known: lora, .*mixlora"), ("method.router", "known: .*top_k")]
)
def test_registry_members_need_a_name(group, known):
    where = re.escape(f"config.{ADAPTER}.{group}.name")
    with pytest.raises(ConfigError, match=f"^{where}: this field is required .*; {known}"):
        parse_run_config(_without(f"{ADAPTER}.{group}.name"), METHODS)


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(ConfigError, match=r"config\.training\.steps: give either steps or epochs"):
        parse_run_config(_raw("training.epochs", 2), METHODS)
    config = parse_run_config(_raw("training", {"epochs": 2}), METHODS)
    assert config.training.epochs == 2.0 and config.training.steps is None
    with pytest.raises(ConfigError, match=r"config\.training\.epochs: must be positive"):
        parse_run_config(_raw("training", {"epochs": 0}), METHODS)


def test_warmup_is_given_one_way_only():
    schedule = {"warmup_steps": 5, "warmup_ratio": 0.1}
    with pytest.raises(ConfigError, match=r"schedule\.warmup_ratio: give warmup_steps or"):
        parse_run_config(_raw(f"{ADAPTER}.optimizer.schedule", schedule), METHODS)


def test_warmup_steps():
    assert ScheduleConfig().warmup(100) == 0
    assert ScheduleConfig(warmup_steps=7).warmup(100) == 7
    assert ScheduleConfig(warmup_ratio=0.03).warmup(200) == 6


def test_only_one_mesh_axis_takes_the_rest():
    mesh = {"data": -1, "tensor": -1}
    with pytest.raises(ConfigError, match=r"config\.mesh\.\w+: only one axis may be -1"):
        parse_run_config(_raw("mesh", mesh), METHODS)


def test_cudnn_attention_needs_half_precision():
    with pytest.raises(ConfigError, match=r"compute\.attention: 'cudnn' needs compute\.dtype"):
        parse_run_config(_raw("compute", {"dtype": "float32", "attention": "cudnn"}), METHODS)
    assert ComputeConfig(dtype="float16", attention="cudnn").attention == "cudnn"


@pytest.mark.parametrize("name", ["validation", "time"])
def test_adapter_names_that_are_taken(name):
    raw = {**RAW, "adapters": {name: RAW["adapters"]["default"]}}
    with pytest.raises(ConfigError, match=f"adapters.{name}: is the name of a group of metrics"):
        parse_run_config(raw, METHODS)


@pytest.mark.parametrize("name", ["", "_a", "-a", ".a", "a.", "a b", "a/b", "é", "a\n"])
def test_invalid_adapter_names(name):
    raw = {**RAW, "adapters": {name: RAW["adapters"]["default"]}}
    with pytest.raises(ConfigError, match="an adapter's name holds letters, digits"):
        parse_run_config(raw, METHODS)


@pytest.mark.parametrize(
    "name", ["a", "0", "layers", "q_proj", "adapter_x", "My-adapter_2", "a-rank=4+8-x=0.1"]
)
def test_adapter_names(name):
    raw = {**RAW, "adapters": {name: RAW["adapters"]["default"]}}
    assert list(parse_run_config(raw, METHODS).adapters) == [name]


def test_a_number_is_no_adapter_name():
    raw = {**RAW, "adapters": {1: RAW["adapters"]["default"]}}
    with pytest.raises(ConfigError, match=r"config\.adapters: .*int \(1\)"):
        parse_run_config(raw, METHODS)


def test_micro_batches_divide_every_batch():
    raw = _raw("training.micro_batches", 3)
    raw["adapters"]["other"] = {**RAW["adapters"]["default"], "batch_size": 9}
    raw["adapters"]["default"]["batch_size"] = 8
    with pytest.raises(ConfigError) as error:
        parse_run_config(raw, METHODS)
    assert str(error.value) == (
        "config.adapters.default.batch_size: 8 rows cannot be cut into "
        "training.micro_batches=3 equal parts; make it a multiple of 3"
    )
    raw["adapters"]["default"]["batch_size"] = 6
    assert parse_run_config(raw, METHODS).training.micro_batches == 3


def test_json_round_trip():
    raw = copy.deepcopy(RAW)
    mixlora = raw["adapters"]["default"]
    mixlora["method"] |= {
        "dropout": 0.05,
        "rslora": True,
        "router": {"name": "top_k", "top_k": 1, "jitter_noise": 0.1},
        "expert_lora": {"rank": 4},
        "losses": {"load_balance": {"coefficient": 0.01, "scope": "pooled"}},
    }
    mixlora["data"] |= {"buckets": (16, 32), "validation": mixlora["data"]["train"]}
    lora = {"name": "lora", "rank": 2, "alpha": 1.5, "target_modules": ("q_proj",)}
    raw["adapters"]["plain"] = {**copy.deepcopy(mixlora), "method": lora}
    raw["base"]["hf_config"] = {"hidden_size": 8, "rope_scaling": None, "eos_token_id": [1, 2]}
    raw["training"] = {"epochs": 1.5, "seed": 4}
    config = parse_run_config(raw, METHODS)

    text = to_json(config)

    assert parse_run_config(json.loads(text), METHODS) == config
    method = config.adapters["default"].method
    assert method.expert_lora == ExpertLoraConfig(rank=4)
    assert method.losses == {"load_balance": LoadBalance(coefficient=0.01, scope="pooled")}
    assert method.router == TopKRouter(top_k=1, jitter_noise=0.1)
    assert config.adapters["plain"].method == LoraConfig(
        rank=2, alpha=1.5, target_modules=("q_proj",)
    )
    plain = {name: adapter["method"] for name, adapter in json.loads(text)["adapters"].items()}
    assert (plain["plain"]["name"], plain["default"]["router"]["name"]) == ("lora", "top_k")


MODEL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("field", MODEL)
def test_no_field_of_the_architecture_has_a_default(field):
    raw = {name: value for name, value in MODEL.items() if name != field}
    with pytest.raises(ConfigError, match=rf"config\.{field}: this field is required"):
        parse(ModelConfig, raw)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("vocab_size", 0, "must be positive"),
        ("hidden_size", -1, "must be positive"),
        ("intermediate_size", 0, "must be positive"),
        ("num_layers", 0, "must be positive"),
        ("num_heads", 0, "must be positive"),
        ("head_dim", 7, "must be even"),
        ("head_dim", 0, "must be even"),
        ("num_kv_heads", 4, "must divide num_heads (6)"),
        ("num_kv_heads", 0, "must divide num_heads (6)"),
    ],
)
def test_invalid_architectures(field, value, reason):
    with pytest.raises(ConfigError) as error:
        parse(ModelConfig, {**MODEL, field: value})
    assert str(error.value) == f"config.{field}: {reason}"


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rope_type": "default", "rope_theta": 1.0}, "rope_theta"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "dynamic"}, "factor"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        *(
            ({"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if k != name}}, name)
            for name in LLAMA3
        ),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor"),
        (
            {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 0},
            "original_max_position_embeddings",
        ),
    ],
)
def test_rope_fields_that_do_not_fit(fields, field):
    with pytest.raises(ConfigError, match=rf"^config\.{field}: "):
        parse(RopeConfig, {"rope_theta": 10000.0, **fields})
