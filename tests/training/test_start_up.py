"""The table that is printed before the first step."""

import dataclasses

import jax
import pytest
from tiny_run import read_config, write_inputs

from moe_jax.training.run.inputs import read_inputs
from moe_jax.training.run.start_up_table import start_up_table
from moe_jax.training.step.program import build_program


@pytest.mark.parametrize(("length", "is_noted"), [(256, False), (257, True)])
def test_rows_longer_than_the_positions_of_the_base_are_noted(tmp_path, length, is_noted):
    overrides = {"max_length": length, "buckets": "()"}
    fields = {f"adapters__default__data__{name}": value for name, value in overrides.items()}
    config = read_config(write_inputs(tmp_path), **fields)
    inputs = read_inputs(config, lambda _: None)
    assert inputs.base.config.max_position_embeddings == 256
    program = build_program(config, inputs.base.config, inputs.steps, jax.devices()[:1])
    texts = [text for _, text in start_up_table(config, inputs, program)]
    note = "its data.max_length of 257 exceeds the 256 positions of the base"
    assert (note in texts) == is_noted


def test_tensors_beside_the_base_model_are_named(tmp_path):
    config = read_config(write_inputs(tmp_path))
    inputs = read_inputs(config, lambda _: None)
    base = dataclasses.replace(inputs.base, unread=("mtp.norm.weight", "score.weight"))
    program = build_program(config, base.config, inputs.steps, jax.devices()[:1])
    table = start_up_table(config, dataclasses.replace(inputs, base=base), program)
    note = f"not read from {base.folder}, as no part of the model: mtp.norm.weight, score.weight"
    assert table[:2] == [start_up_table(config, inputs, program)[0], ("", note)]
