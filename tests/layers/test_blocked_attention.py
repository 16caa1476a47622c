"""Blocked attention against PyTorch's gradients of plain attention, and its memory."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import GRADIENT_ROUNDING, ROUNDING

from moe_jax.layers import attention
from moe_jax.layers.blocked_attention import (
    ATTENTION,
    BlockSettings,
    block_pairs,
    blocked_attention,
)

BLOCK = 8


def _case(heads=(4, 2), length=21, segments=None, slides=None, **options):
    return SimpleNamespace(
        heads=heads,
        length=length,
        segments=segments,
        slides=slides,
        options={"scale": 0.4, "softcap": None, "window": None} | options,
    )


# Within blocks and across them; the first starts behind padding, the second is behind one another.
PACKED = np.array([[0] * 10 + [1] * 11, [1] * 3 + [2] * 9 + [3] * 7 + [0] * 2])
CASES = {
    "whole blocks": _case((4, 4), 24),
    "grouped heads and a shorter block": _case((6, 2)),
    "packed and padded": _case(segments=PACKED),
    "one key head, a window within a block": _case((3, 1), 17, window=3),
    "a window across blocks": _case(window=11, segments=PACKED),
    "a cap": _case(softcap=1.5, window=9, segments=PACKED),
    "a window in this layer": _case(window=5, slides=True, segments=PACKED),
    "no window in this layer": _case(window=5, slides=False),
}


def _inputs(case, dtype=np.float32):
    rng = np.random.default_rng(case.length)
    heads, kv_heads = case.heads
    shapes = [(2, case.length, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _oracle(case, query, key, value, upper):
    """The result and the gradients of query, key and value, in float64."""
    index = np.arange(case.length)
    allowed = (index[:, None] >= index[None, :])[None]
    if case.options["window"] is not None and case.slides is not False:
        allowed = allowed & (index[:, None] - index[None, :] < case.options["window"])
    if case.segments is not None:
        allowed = allowed & (case.segments[:, :, None] == case.segments[:, None, :])
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (query, key, value)]
    groups = case.heads[0] // case.heads[1]
    keys, values = (x.repeat_interleave(groups, dim=2) for x in inputs[1:])
    scores = case.options["scale"] * torch.einsum("bshq,bthq->bhst", inputs[0], keys)
    if (cap := case.options["softcap"]) is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~torch.tensor(allowed)[:, None], -torch.inf)
    attended = torch.einsum("bhst,bthq->bshq", torch.softmax(scores, -1), values)
    attended.backward(torch.tensor(upper, dtype=torch.float64))
    return [attended.detach().numpy(), *(x.grad.numpy() for x in inputs)]


def _with_gradients(function, query, key, value, upper):
    attended, backward = jax.vjp(function, query, key, value)
    return attended, *backward(upper)


def _ours(case, *inputs):
    settings = BlockSettings(**case.options, block=BLOCK)
    segments = None if case.segments is None else jnp.asarray(case.segments)

    @jax.jit
    def run(slides, *inputs):
        function = lambda *qkv: blocked_attention(settings, *qkv, segments, slides)
        return _with_gradients(function, *inputs)

    return run(case.slides, *inputs)


@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch_with_all_gradients(name):
    inputs = _inputs(CASES[name])
    ours, expected = _ours(CASES[name], *inputs), _oracle(CASES[name], *inputs)
    np.testing.assert_allclose(ours[0], expected[0], **ROUNDING)
    for found, right in zip(ours[1:], expected[1:], strict=True):
        np.testing.assert_allclose(found, right, **GRADIENT_ROUNDING)


def test_segments_change_the_result():
    case = CASES["packed and padded"]
    inputs = _inputs(case)
    alone = _case(segments=None)
    assert np.abs(_oracle(case, *inputs)[0] - _oracle(alone, *inputs)[0]).max() > 0.1


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_half_precision(dtype, bits):
    case = CASES["a window across blocks"]
    inputs = [jnp.asarray(x, dtype) for x in _inputs(case)]
    expected = _oracle(case, *(np.asarray(x, np.float64) for x in inputs))
    for found, right in zip(_ours(case, *inputs), expected, strict=True):
        assert found.dtype == jnp.dtype(dtype)
        # Every number in the sums is rounded by 2^-bits at most, a few times on its way.
        error = np.linalg.norm(np.asarray(found, np.float64) - right)
        assert error < 4 * 2.0**-bits * np.linalg.norm(right)


def test_pairs_by_hand():
    # Three blocks of four. A window of five reaches from position 4 to 0, and from 8 to 4; one of
    # six from 8 to 3, in the first block.
    def pairs(window):
        return [tuple(pair) for pair in block_pairs(3, 4, window)]

    causal = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    assert pairs(None) == pairs(6) == causal
    assert pairs(5) == pairs(2) == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
    assert pairs(1) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("length", [BLOCK, BLOCK + 1])
def test_only_rows_longer_than_a_block_use_blocks(length, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", BLOCK)
    case = _case(length=length)
    *inputs, _ = _inputs(case)
    run = partial(attention.causal_attention, segment_ids=None, implementation="xla")
    program = str(jax.make_jaxpr(run)(*inputs))
    assert ("scan" in program) == (length > BLOCK)
    expected = attention._einsum_attention(*inputs, None, 8**-0.5, None, None, None)
    np.testing.assert_allclose(run(*inputs), expected, **ROUNDING)


@pytest.mark.parametrize(("window", "gpu_block"), [(None, 1024), (512, 512), (100, 256)])
def test_blocks_are_larger_in_programs_for_gpus(window, gpu_block):
    case = _case(length=2048)
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in _inputs(case)]

    def run(*inputs):
        options = {"segment_ids": None, "implementation": "xla", "window": window}
        return _with_gradients(partial(attention.causal_attention, **options), *inputs)

    for platform, block in (("cuda", gpu_block), ("cpu", 256), ("tpu", 256)):
        text = jax.jit(run).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        scores = set(re.findall(r"tensor<2x2x2x(\d+)x\1xf32>", text))
        assert scores == {str(block)}


def _compiled(function, length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
    run = jax.jit(partial(_with_gradients, function))
    return run.lower(shape, shape, shape, shape).compile()


def test_memory_grows_linearly():
    function = lambda *qkv: blocked_attention(BlockSettings(0.5, None, None, 32), *qkv, None, None)
    short, middle, long = (
        _compiled(function, length).memory_analysis().temp_size_in_bytes
        for length in (256, 512, 1024)
    )
    # a + b S: twice as many positions more take twice as much more memory, and not four times.
    assert 0 < long - middle < 2.2 * (middle - short)
    plain = lambda *qkv: attention._einsum_attention(*qkv, None, 0.5, None, None, None)
    scores = 2 * 1024 * 1024 * 4
    assert long < scores / 4 < scores < _compiled(plain, 1024).memory_analysis().temp_size_in_bytes


def test_a_policy_can_keep_the_forward_pass():
    function = lambda *qkv: blocked_attention(BlockSettings(0.5, None, None, 32), *qkv, None, None)
    keep = jax.checkpoint_policies.save_only_these_names(ATTENTION)

    def flops(**options):
        # A loop counts as one of its steps, and a step has 2 products forwards and 5 backwards.
        layer = jax.checkpoint(lambda *qkv: jnp.sin(function(*qkv)), **options)
        return _compiled(layer, 64).cost_analysis()["flops"]

    product = 2 * 2 * 32 * 32 * 4
    assert flops() - flops(policy=keep) > 2 * product


def test_on_a_mesh(devices):
    case = CASES["a cap"]
    inputs = _inputs(case)
    expected = _ours(case, *inputs)
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), auto, devices=devices[:4])
    heads = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    rows = jax.device_put(jnp.asarray(case.segments), NamedSharding(mesh, PartitionSpec("data")))
    settings = BlockSettings(**case.options, block=BLOCK)

    @partial(jax.jit, out_shardings=heads)
    def run(rows, *inputs):
        function = lambda *qkv: blocked_attention(settings, *qkv, rows, None)
        return _with_gradients(function, *inputs)

    run = run.lower(rows, *(jax.device_put(x, heads) for x in inputs)).compile()
    found = run(rows, *(jax.device_put(x, heads) for x in inputs))
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, right, **ROUNDING)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in run.as_text()
