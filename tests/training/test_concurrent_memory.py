"""Memory of the compiled step with N adapters: one base, N adapters and their activations."""

import math
from typing import Any

import jax
import pytest
import tiny_program

# A base much larger than the adapters and the activations of four tokens each, so that a second
# copy of it, or of a part for each adapter, is visible.
MODEL = tiny_program.model_config(
    vocab_size=64,
    hidden_size=512,
    intermediate_size=2048,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
)
LORA = {**tiny_program.LORA, "rank": 1}
MIXLORA = {**tiny_program.MIXLORA, "rank": 1, "num_experts": 2}
TOKENS = 4


def in_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def compiled():
    """Program and memory analysis of its compiled step, by number of adapters."""
    programs = {}
    for count in (1, 2, 4):
        methods = {f"a{i}": MIXLORA if i % 2 else LORA for i in range(count)}
        optimizer = {"learning_rate": 1e-3}
        program = tiny_program.program(methods, rows=1, config=MODEL, optimizer=optimizer)
        programs[count] = program, program.compiled_train_step(TOKENS).memory_analysis()
    return programs


def test_arguments_are_one_base_and_the_adapters(compiled):
    for count, (program, memory) in compiled.items():
        base, state = in_bytes(program.abstract_params), in_bytes(program.abstract_state)
        assert in_bytes(program.abstract_state.adapters) < base / 50
        # Id, segment, position and loss mask of each token; the expert group is unused.
        batch = count * TOKENS * (4 + 4 + 4 + 1)
        # The flag of a finite last gradient is written and never read: one byte each.
        assert memory.argument_size_in_bytes == base + state + batch - count


def test_temporary_memory_grows_by_activations(compiled):
    base = in_bytes(compiled[1][0].abstract_params)
    temporary = {count: memory.temp_size_in_bytes for count, (_, memory) in compiled.items()}
    # Measured on CPU with jax 0.10.2: 18.3, 22.2 and 27.6 MB beside a base of 67.4 MB. Most of the
    # first is the current layer, which the scan copies out of the stack.
    assert temporary[1] < temporary[2] < temporary[4] < base / 2
    assert (temporary[4] - temporary[1]) / 3 < base / 12
