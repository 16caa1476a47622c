"""What a small step compiled for an H200 computes: the operations that it needs, each once.

Without jax's CUDA plugin the figures are those that `tests/record_gpu_program.py` has written.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import record_gpu_program as record

from moe_jax.compiled.roofline import ATTENTION, ATTENTION_BACKWARD, PALLAS
from moe_jax.compiled.target import compiler_version
from moe_jax.training.step.needed_flops import needed_flops

ROWS, LENGTH = record.FLAGS.rows, record.FLAGS.length
LAYERS, CHANNELS = 2, 64


def _stored():
    return json.loads(record.FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compiled():
    """What the script records here; without the plugin, the file."""
    if compiler_version("gpu") is None:
        return _stored()
    # In a process of its own, since flags of XLA hold for all of a process.
    command = [sys.executable, str(Path(record.__file__)), "--print"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@pytest.fixture(scope="module")
def figures(compiled):
    return compiled["steps"]


def test_the_file_is_what_its_compiler_makes(compiled):
    # Other versions choose other kernels.
    assert compiled["compiler"] != _stored()["compiler"] or compiled == _stored()


def _needed_without_attention(method):
    program = record.step_program(method, jax.devices()[:1], attention="xla")
    adapters = program.abstract_state.adapters
    (token,) = needed_flops(program.model.config, program.config.methods, adapters).token.values()
    return ROWS * LENGTH * token


def _products(step):
    kinds = step["kinds"].items()
    return sum(s["flops"] for kind, s in kinds if kind not in (ATTENTION, ATTENTION_BACKWARD))


def test_lora_computes_each_product_once(figures):
    assert _products(figures["lora"]) == _needed_without_attention("lora")


def test_mixlora_multiplies_with_all_experts(figures):
    # A step needs two of the four experts. It computes the low-rank activations of all four, of
    # `down_proj` for each of two slots; and for each slot `B` of all four on `gate_proj` and
    # `up_proj`, but for both together on `down_proj`.
    wide, rank = 176, record.FLAGS.rank * record.FLAGS.experts
    needed = rank // 2 * 3 * (CHANNELS + wide)
    computed = rank * ((2 + 1) * CHANNELS + (2 + 2 * 2) * wide)
    # The router's products are of three bfloat16 parts of a float32 matrix side by side: 12 columns
    # for four experts, which XLA pads to 16.
    router = CHANNELS * (16 - record.FLAGS.experts)
    more = 6 * LAYERS * (computed - needed + router) * ROWS * LENGTH
    assert _products(figures["mixlora"]) == _needed_without_attention("mixlora") + more


def test_fused_experts_are_three_kernels_a_layer(figures):
    kernels = figures[record.FUSED]["kinds"][PALLAS]
    assert kernels["kernels"] == 3 * LAYERS
    # Three products of each slot's code forward, of 16 numbers at least, and 5 + 6 backward.
    tokens, wide, rank, slots = ROWS * LENGTH, 176, 16, record.FLAGS.top_k
    assert kernels["flops"] == 2 * tokens * wide * rank * slots * (3 + 5 + 6) * LAYERS
    # Arrays [T, F] in half precision: 3 forward, and 5 + 3 for each slot backward.
    read_and_written = 2 * tokens * wide * (3 + 5 + 3 * slots) * LAYERS
    assert kernels["moved"] > read_and_written


@pytest.mark.parametrize("method", record.METHODS)
def test_attention_is_one_kernel_a_layer_in_each_direction(figures, method):
    kinds = figures[method]["kinds"]
    # Half of the pairs; two products forward, and five backward.
    product = 2 * CHANNELS * LENGTH**2 / 2 * ROWS * LAYERS
    for kind, products in ((ATTENTION, 2), (ATTENTION_BACKWARD, 5)):
        assert kinds[kind]["kernels"] == LAYERS
        assert kinds[kind]["flops"] == products * product


@pytest.mark.parametrize("method", record.METHODS)
def test_memory_is_that_of_the_arrays(figures, method):
    step = figures[method]
    program = record.step_program(method, jax.devices()[:1], attention="xla")
    state, params = program.abstract_state, program.abstract_params
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, params)))
    tokens = ROWS * LENGTH * (5 * 4 + 1)  # five arrays of 32 bits, and a mask
    assert arrays < step["argument_bytes"] < arrays + tokens + 4096  # and a key
    assert step["peak_bytes"] > step["argument_bytes"] + step["temporary_bytes"]
    assert step["unknown_loops"] == 0
