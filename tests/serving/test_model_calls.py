"""Hidden states of every method from a cache in blocks, compared with one pass over the rows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from inference.test_cache import METHOD_FIELDS, MODEL, PAIR
from tolerances import FLOAT32_LOGITS

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import NoAdapter
from moe_jax.adapters.row_window import RowWindow
from moe_jax.adapters.rows import AdapterRows
from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import parse_member
from moe_jax.layers.block_cache import BlockPool, write_blocks
from moe_jax.models.adapted import apply, untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.serving.model_calls import (
    Cache,
    Call,
    SlotAdapter,
    adapter_values,
    is_by_row,
    method_key,
    run_layers,
)

NAMES = (*METHOD_FIELDS, "base")
LENGTH, BLOCK, CHUNK = 18, 4, 5
PROMPTS = np.array([7 + row % 3 for row in range(len(NAMES))])  # two parts each


@pytest.fixture(scope="module")
def weights():
    """The model without rows, methods, and random parameters of the base and of the adapters."""
    methods = {
        name: parse_member(METHODS, {**PAIR, **fields}, name)
        for name, fields in METHOD_FIELDS.items()
    }
    bare = LlamaForCausalLM(MODEL, ComputeConfig(dtype="float32"))
    init = functools.partial(bare.init, tokens=jnp.zeros((1, 2), jnp.int32))
    params = _random(nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))["params"])
    trees = {}
    for name, method in methods.items():
        untrained = functools.partial(untrained_adapter, bare, method)
        trees[name] = _random(nn.meta.unbox(jax.eval_shape(untrained, params, jax.random.key(0))))
    return bare, methods, params, trees


def _random(shapes):
    devices = jax.tree.map(lambda _: jax.devices()[0], shapes)
    return tiny_program.random_leaves(shapes, devices, seed=1)


@pytest.fixture(scope="module")
def computed(weights):
    """Hidden states of each row in one pass, and those of its tokens from the cache in blocks."""
    bare, methods, params, trees = weights
    tokens = np.random.default_rng(0).integers(0, 96, (len(NAMES), LENGTH)).astype(np.int32)
    everyone = {**methods, "base": NoAdapter()}
    static = tuple(AdapterRows(n, m, i, i + 1) for i, (n, m) in enumerate(everyone.items()))
    hidden = LlamaForCausalLM.hidden_states
    whole = apply(bare.clone(adapter_rows=static), params, trees, hidden, tokens)

    values = {n: adapter_values(bare, m, params, trees[n]) for n, m in methods.items()}
    adapters, row_values = {}, {}
    for name, method in methods.items():
        constants = {path: v for path, v in values[name].items() if not is_by_row(path)}
        adapters[name] = SlotAdapter(trees[name], constants)
        # Not zero, as a row leaves it that was there before.
        row_values[method_key(method)] = {
            path: jnp.full((*v.shape[:-2], len(NAMES) + 1, v.shape[-1]), 9, v.dtype)
            for path, v in values[name].items()
            if is_by_row(path)
        }
    per_row = -(-LENGTH // BLOCK)
    shape = (2, 1 + len(NAMES) * per_row, MODEL.num_kv_heads, BLOCK, MODEL.head_dim)
    cache = Cache(BlockPool(jnp.zeros(shape), jnp.zeros(shape)), row_values)
    order = np.random.default_rng(1).permutation(len(NAMES) * per_row) + 1
    tables = order.reshape(len(NAMES), per_row, 1).astype(np.int32)
    windows = {n: RowWindow(np.int32(i), np.ones(1, bool)) for i, n in enumerate(methods)}
    slots = tuple(AdapterRows(name, method, 0, 1) for name, method in methods.items())
    run = jax.jit(functools.partial(run_layers, bare.clone(adapter_rows=slots)))

    found, lengths = [[] for _ in NAMES], np.zeros(len(NAMES), np.int32)
    while lengths.min() < LENGTH:
        is_prompt = lengths.min() < PROMPTS.min()
        width = CHUNK if is_prompt else 1
        stops = PROMPTS if is_prompt else np.full(len(NAMES), LENGTH)
        counts = np.minimum(stops - lengths, width).clip(0)
        mask = np.arange(width)[None] < counts[:, None]
        places = np.minimum(lengths[:, None] + np.arange(width), LENGTH - 1)
        given = np.where(mask, np.take_along_axis(tokens, places, axis=1), 0)
        known = np.maximum(PROMPTS, lengths + counts).astype(np.int32)
        rows = np.arange(len(NAMES), dtype=np.int32)
        call = Call(given, mask, rows, tables, lengths, known, windows)
        result = run(params, adapters, cache, call)
        pool = write_blocks(cache.pool, result.updates, tables, lengths, mask)
        cache = Cache(pool, result.row_values)
        for row, count in enumerate(counts):
            found[row] += list(np.asarray(result.hidden)[row, :count])
        lengths = lengths + counts.astype(np.int32)
    return {name: (np.asarray(whole)[row], np.array(found[row])) for row, name in enumerate(NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_parts_and_single_tokens_equal_one_pass(name, computed):
    whole, by_part = computed[name]
    assert by_part.shape == whole.shape == (LENGTH, MODEL.hidden_size)
    np.testing.assert_allclose(by_part, whole, rtol=0, atol=FLOAT32_LOGITS)


def test_keys_of_methods_do_not_depend_on_hashes(monkeypatch):
    """Hashes of strings differ between processes, and those of two methods may be equal."""
    names = ("mixlora_switch", "mixlora_switch_unlimited")
    methods = [parse_member(METHODS, {**PAIR, **METHOD_FIELDS[name]}, name) for name in names]
    before = [method_key(method) for method in methods]
    monkeypatch.setattr(type(methods[0]), "__hash__", lambda _: 7)
    assert [method_key(method) for method in methods] == before
    assert before[0] != before[1]
