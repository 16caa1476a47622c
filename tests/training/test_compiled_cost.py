"""Cost of a step as XLA reports it for the compiled program, which is free of noise."""

import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program

from moe_jax.adapters import METHODS
from moe_jax.config.command_line import load_config_file
from moe_jax.config.run import parse_run_config
from moe_jax.hf.config import model_config_from_hf
from moe_jax.training.records.plan import (
    LIBRARIES_BYTES,
    describe_plan,
    memory_plan,
    process_plan,
    resident_memory,
)
from moe_jax.training.step.program import build_program

# Widths that no adapter has, so that shapes tell products of frozen kernels apart.
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
    """Result shapes of the matrix products in a compiled program."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)
    return {tuple(int(n) for n in shape.split(",")) for shape in shapes}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_a_frozen_weight_is_computed(remat):
    shapes = _product_shapes(_program(2, remat).lower_train_step(16).compile().as_text())
    assert shapes
    assert not shapes & _KERNELS


def test_the_search_detects_gradients_of_frozen_weights():
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
    config = parse_run_config(load_config_file(str(path)), METHODS)
    model_config = model_config_from_hf(config.base.hf_config, "config.base.hf_config")
    program = build_program(config, model_config, total_steps=100)

    plan = memory_plan(program, row_length=512)
    text = describe_plan(program, row_length=512)
    assert plan is not None

    # Llama-2-7B has 6,738,415,616 parameters in bfloat16; all but the norms are in eight shards.
    norms = (2 * 32 + 1) * 4096
    assert plan.params == 2 * ((6_738_415_616 - norms) // 8 + norms)
    assert "6,738,415,616 parameters" in text
    # 32 layers: 4 LoRA pairs of rank 16 on 4096 wide projections; 8 experts of 3 pairs; a router.
    layer = 4 * 16 * (4096 + 4096) + 8 * 3 * 16 * (4096 + 11008) + 4096 * 8
    assert f"{32 * layer:,} parameters" in text
    assert plan.adapters == 4 * 32 * layer // 8
    # Two moments of Adam, and a few counters.
    assert 0 <= plan.optimizer - 2 * plan.adapters < 1024
    # The layers' inputs and the products with q, k, v, o, gate and up, which rematerialization
    # keeps, are the least there must be; a CPU multiplies bfloat16 in float32, so that they may be
    # kept in it, and the weights of a device may be there once over in it: the most.
    kept = 32 * (16 // 8) * 512 * (5 * 4096 + 2 * 11008) * 2
    assert kept < plan.temporary < 2 * kept + 5 * plan.params
    assert plan.total == sum(plan[:4])


def test_plan_without_memory_of_the_backend(monkeypatch):
    program = tiny_program.program({"default": tiny_program.LORA})
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    monkeypatch.setattr(type(program), "compiled_train_step", lambda self, length: silent)
    assert memory_plan(program, row_length=16) is None
    assert describe_plan(program, row_length=16).endswith("not reported by this backend")


def test_resident_memory_of_the_process():
    before = resident_memory()
    size = 256 * 2**20
    array = np.ones(size, np.uint8)
    during = resident_memory()
    assert 0.9 * size < during.now - before.now < 1.2 * size
    assert during.peak >= during.now
    del array
    after = resident_memory()
    assert after.now < during.now - 0.9 * size
    assert after.peak == pytest.approx(during.peak, rel=0.01)


def test_process_beside_the_plan_on_one_cpu():
    program = tiny_program.program({"default": tiny_program.LORA})
    plan = memory_plan(program, row_length=16)
    # LoRA of rank 4 has 4 x 704 weights a layer; Adam's moments are missing, as SGD is used.
    assert plan.peak - plan.total == plan.adapters + plan.optimizer
    assert plan.adapters == 4 * 3 * 4 * 704
    process = process_plan(plan, program)
    held = max(resident_memory().now, LIBRARIES_BYTES)
    assert abs(process - plan.peak - held) < 2**26
    last = describe_plan(program, row_length=16).splitlines()[-1]
    assert last.startswith("  process  ") and "of libraries, compiler and data" in last


def test_no_process_beside_the_plan_of_several_devices():
    mesh = {"data": 2}
    program = tiny_program.program({"default": tiny_program.LORA}, mesh=mesh, devices=2)
    assert process_plan(memory_plan(program, row_length=16), program) is None
    assert "process" not in describe_plan(program, row_length=16)
