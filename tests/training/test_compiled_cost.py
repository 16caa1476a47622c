"""What a step costs, read from the compiled program: counted by XLA, so free of noise."""

import dataclasses
import importlib.util
import re
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny_program

from moe_jax.adapters import METHODS
from moe_jax.adapters.lora import Lora, LoraConfig
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.routers import TopKRouter
from moe_jax.adapters.segments import segments_of
from moe_jax.adapters.targets import ATTENTION_MODULES
from moe_jax.checkpoints.hf_config import model_config_from_hf
from moe_jax.config.model import ComputeConfig
from moe_jax.config.run import parse_run_config
from moe_jax.models.decoder import DecoderLayer, LayerSettings, TokenContext
from moe_jax.training.plan import describe_plan, memory_plan
from moe_jax.training.program import build_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualSizeLora(LoraConfig):
    """Plain LoRA with as many trainable weights as E experts of rank R: rank E * R on the FFN."""

    ffn_rank: int

    def projection_adapter(self, target, axes):
        rank = self.rank if target in ATTENTION_MODULES else self.ffn_rank
        return Lora(dataclasses.replace(self.low_rank, rank=rank), axes)


def _layer_step(width, ffn_width, heads, rank, experts, rows, length, which):
    """Forward and backward of one layer, to the adapters and to the layer's input, compiled."""
    config = tiny_program.model_config(
        hidden_size=width,
        intermediate_size=ffn_width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
    )
    common = {"rank": rank, "alpha": 16.0, "target_modules": tiny_program.ALL_TARGETS}
    methods = {
        "none": {},
        "lora": {"a": EqualSizeLora(**common, ffn_rank=experts * rank)},
        "mixlora": {"a": MixLoraConfig(**common, num_experts=experts, router=TopKRouter(top_k=2))},
    }[which]
    segments = segments_of(methods, dict.fromkeys(methods, rows))
    compute, dtype = ComputeConfig(dtype="float32"), jnp.dtype("float32")
    layer = DecoderLayer(LayerSettings(config, compute, dtype, segments, deterministic=True))

    def context(table, mask):
        return TokenContext(table, table, None, mask, expert_groups=None)

    x = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
    table = jax.ShapeDtypeStruct((rows, length, width // heads), jnp.float32)
    mask = jax.ShapeDtypeStruct((rows, length), jnp.bool)

    def init(key, x, table, mask):
        keys = {"params": key, "adapters": key}
        return nn.meta.unbox(layer.init(keys, x, context(table, mask), jnp.int32(0)))

    variables = jax.eval_shape(init, jax.random.key(0), x, table, mask)

    def step(adapters, params, x, table, mask, cotangent):
        def loss(adapters, x):
            (y, _), sown = layer.apply(
                {"params": params, "adapters": adapters},
                x,
                context(table, mask),
                jnp.int32(0),
                mutable=["router"],
            )
            return jnp.sum(y * cotangent) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))

        return jax.grad(loss, argnums=(0, 1))(adapters, x)

    adapters = variables.get("adapters", {})
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    compiled = jax.jit(step).lower(adapters, variables["params"], x, table, mask, x).compile()
    return compiled.cost_analysis()["flops"], trainable


@pytest.mark.parametrize(
    ("shape", "of_lora", "of_frozen"),
    [
        (
            dict(width=512, ffn_width=1376, heads=8, rank=8, experts=8, rows=8, length=128),
            1.12,
            1.35,
        ),
        (
            dict(width=4096, ffn_width=11008, heads=32, rank=16, experts=8, rows=1, length=512),
            1.04,
            1.09,
        ),
    ],
    ids=["D512", "7B"],
)
def test_mixlora_costs_what_lora_costs(shape, of_lora, of_frozen):
    frozen, none = _layer_step(**shape, which="none")
    lora, lora_size = _layer_step(**shape, which="lora")
    mixlora, mixlora_size = _layer_step(**shape, which="mixlora")
    # The router is all that MixLoRA trains besides: D * E weights.
    assert none == 0
    assert mixlora_size - lora_size == shape["width"] * shape["experts"]
    assert mixlora / lora <= of_lora
    assert mixlora / frozen <= of_frozen


# Widths that occur in no adapter, so that a product of a frozen kernel's shape is recognised.
_CONFIG = {"hidden_size": 48, "intermediate_size": 112, "num_heads": 5, "num_kv_heads": 5}
_KERNELS = {(48, 40), (40, 48), (48, 112), (112, 48), (48, 96), (96, 48)}


def _program(num_layers, remat="none"):
    config = tiny_program.model_config(**_CONFIG, num_layers=num_layers)
    return tiny_program.program(
        {"default": tiny_program.MIXLORA},
        config=config,
        optimizer={"name": "adamw", "learning_rate": 1e-3},
        compute={"remat": remat},
    )


def _product_shapes(text):
    """Result shapes of all matrix products of a compiled program."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)
    return {tuple(int(n) for n in shape.split(",")) for shape in found}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_a_frozen_weight_is_computed(remat):
    shapes = _product_shapes(_program(2, remat).lower_train_step(16).compile().as_text())
    assert shapes
    assert not shapes & _KERNELS


def test_the_search_for_frozen_gradients_finds_them_where_they_are():
    program = _program(2)
    tokens = jnp.zeros((8, 16), jnp.int32)
    model = program.model

    def loss(params):
        return jnp.sum(model.apply({"params": params}, tokens))

    text = jax.jit(jax.grad(loss)).lower(program.abstract_params).compile().as_text()
    assert _product_shapes(text) & _KERNELS


def test_program_size_does_not_depend_on_depth():
    two, six = (_program(layers).lower_train_step(16).as_text() for layers in (2, 6))
    assert len(two.splitlines()) == len(six.splitlines())


def test_memory_plan_of_the_7b_configuration():
    path = Path(__file__).parents[2] / "configs" / "llama7b_mixlora.py"
    spec = importlib.util.spec_from_file_location("llama7b_mixlora", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = parse_run_config(module.get_config().to_dict(), METHODS)
    model_config = model_config_from_hf(config.base.hf_config, "config.base.hf_config")
    program = build_program(config, model_config, total_steps=100)

    plan = memory_plan(program, row_length=512)
    text = describe_plan(program, row_length=512)
    assert plan is not None

    # Llama-2-7B has 6,738,415,616 parameters; bfloat16, in eight parts, but for the norms.
    norms = (2 * 32 + 1) * 4096
    assert plan.params == 2 * ((6_738_415_616 - norms) // 8 + norms)
    assert "6,738,415,616 parameters" in text
    # 32 layers: 4 LoRA pairs of rank 16 on 4096 wide projections; 8 experts of 3 pairs; a router.
    layer = 4 * 16 * (4096 + 4096) + 8 * 3 * 16 * (4096 + 11008) + 4096 * 8
    assert f"{32 * layer:,} parameters" in text
    assert plan.adapters == 4 * 32 * layer // 8
    # Adam's two moments, and a few counters.
    assert 0 <= plan.optimizer - 2 * plan.adapters < 1024
    # The layers' inputs, which full rematerialisation keeps, are the least there must be; the
    # weights of a device, once over in float32 (which is how CPUs multiply bfloat16), the most.
    inputs = 32 * (16 // 8) * 512 * 4096 * 2
    assert inputs < plan.temporary < inputs + 5 * plan.params
    assert plan.total == sum(plan[:4])


def test_a_backend_that_reports_no_memory_still_has_a_plan(monkeypatch):
    program = tiny_program.program({"default": tiny_program.LORA})
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    monkeypatch.setattr(type(program), "compiled_train_step", lambda self, length: silent)
    assert memory_plan(program, row_length=16) is None
    assert describe_plan(program, row_length=16).endswith("not reported by this backend")
