"""The plan of a step on a chip that it was compiled for; this machine's compiler stands in."""

import pytest
from tiny_program import LORA, program

from moe_jax.compiled.chips import CHIPS
from moe_jax.compiled.roofline import roofline
from moe_jax.training.records import chip_plan
from moe_jax.training.step.needed_flops import needed_flops


def test_a_plan_is_that_of_the_compiled_step(monkeypatch):
    monkeypatch.setattr(chip_plan, "compiler_version", lambda platform: f"compiler of {platform}")
    made = program({"a": LORA})
    plan = chip_plan.chip_plan(made, 16, "h200")
    compiled, chip = made.compiled_train_step(16), CHIPS["h200"]
    memory = compiled.memory_analysis()
    assert plan.program.memory.arguments == memory.argument_size_in_bytes
    assert plan.program.memory.temporary == memory.temp_size_in_bytes
    assert plan.program.model == roofline(compiled.as_text(), chip.rates_of("float32"))
    needed = needed_flops(made.model.config, made.config.methods, made.abstract_state.adapters)
    seconds = plan.program.model.total.seconds
    assert plan.needed_flops == needed.of_full_rows({"a": 8}, 16)
    assert plan.tokens_per_second == pytest.approx(8 * 16 / seconds)
    assert plan.mfu(1e12) == pytest.approx(plan.needed_flops / seconds / 1e12)

    text = chip_plan.describe_chip_plan(made, 16, "h200")
    assert "compiled by compiler of gpu, not run" in text
    assert f"{plan.program.model.total.kernels:,}  launches a step" in text
    assert f"{plan.tokens_per_second:,.0f}  tokens/s estimated" in text
    assert "of 141.00 GiB\n" in text
    assert "The time is an estimate" in text
    small = {**CHIPS, "h200": chip.__class__(**{**vars(chip), "memory_bytes": 1000})}
    monkeypatch.setattr(chip_plan, "chip_named", small.__getitem__)
    assert ": the step does not fit" in chip_plan.describe_chip_plan(made, 16, "h200")
