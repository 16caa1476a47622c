"""From the model's own tree of adapters to one tree an adapter, and back, whatever their names."""

import jax
import numpy as np
import pytest
import tiny_program

from moe_jax.adapters import METHODS
from moe_jax.adapters.rows import divide_rows
from moe_jax.adapters.tree import split_by_adapter, to_collection
from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import parse_member
from moe_jax.models.causal_lm import LlamaForCausalLM

AWKWARD = [
    "layers",
    "mlp",
    "moe",
    "q_proj",
    "adapter_x",
    "self_attn",
    "router",
    "lora_A",
    "a-b",
    "0",
]


def test_the_two_forms_by_hand():
    collection = {
        "layers": {
            "self_attn": {"q_proj": {"adapter_x": {"lora_A": 1}, "adapter_y": {"lora_A": 2}}},
            "mlp": {
                "moe": {"adapter_x": {"up_proj": {"lora_A": 3}, "router": {"kernel": 4}}},
                "up_proj": {"adapter_y": {"lora_B": 5}},
            },
        }
    }
    adapters = {
        "x": {
            "layers": {
                "self_attn": {"q_proj": {"lora_A": 1}},
                "mlp": {"moe": {"up_proj": {"lora_A": 3}, "router": {"kernel": 4}}},
            }
        },
        "y": {
            "layers": {
                "self_attn": {"q_proj": {"lora_A": 2}},
                "mlp": {"up_proj": {"lora_B": 5}},
            }
        },
    }
    assert split_by_adapter(collection) == adapters
    assert to_collection(adapters) == collection
    assert to_collection({"y": adapters["y"]})["layers"]["mlp"] == {
        "up_proj": {"adapter_y": {"lora_B": 5}}
    }
    assert to_collection({}) == {}


@pytest.mark.parametrize("kinds", ["mixed", "mixed_the_other_way"])
def test_every_name_goes_through_the_model_and_back(kinds):
    methods = [tiny_program.LORA, tiny_program.MIXLORA]
    methods = methods if kinds == "mixed" else methods[::-1]
    named = {name: methods[i % 2] for i, name in enumerate(AWKWARD)}
    parsed = {name: parse_member(METHODS, method, name) for name, method in named.items()}
    adapter_rows = divide_rows(parsed, dict.fromkeys(parsed, 1))
    model = LlamaForCausalLM(
        tiny_program.model_config(), ComputeConfig(dtype="float32"), adapter_rows
    )
    tokens = np.zeros((len(AWKWARD), 2), np.int32)
    rngs = {"params": jax.random.key(0), "adapters": jax.random.key(0)}
    collection = jax.eval_shape(model.init, rngs, tokens)["adapters"]

    adapters = split_by_adapter(collection)

    assert set(adapters) == set(AWKWARD)
    for name, method in named.items():
        mlp = adapters[name]["layers"]["mlp"]
        moe = set(mlp) == {"moe"}
        assert moe == (method is tiny_program.MIXLORA)
        assert set(mlp["moe"] if moe else mlp) - {"router"} == {"gate_proj", "up_proj", "down_proj"}
    assert to_collection(adapters) == collection
