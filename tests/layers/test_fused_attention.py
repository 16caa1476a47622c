"""Calls of cuDNN's fused attention, read from programs lowered for CUDA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from tolerances import ROUNDING

from moe_jax.layers.attention import causal_attention
from moe_jax.models.remat import REMAT_POLICIES

LENGTH, WINDOW = 192, 48
PLAIN = ["fmhaSoftmax", "fmhaSoftmaxBackward"]
WITH_BIAS = ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]


@pytest.fixture(autouse=True)
def _cudnn(monkeypatch):
    # The only query to the machine before the program goes to the compiler.
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def _program(*, length=LENGTH, segments=False, **options):
    """The program for CUDA of the attention and its gradients, as text."""
    heads = [jax.ShapeDtypeStruct((2, length, count, 64), jnp.bfloat16) for count in (4, 2, 2)]
    segment_ids = jax.ShapeDtypeStruct((2, length), jnp.int32) if segments else None
    slides = jax.ShapeDtypeStruct((), jnp.bool) if options.pop("traced", False) else None

    def gradients(query, key, value, segment_ids, slides):
        def total(*inputs):
            attended = causal_attention(
                *inputs, segment_ids=segment_ids, slides=slides, implementation="cudnn", **options
            )
            return attended.astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(query, key, value)

    traced = jax.jit(gradients).trace(*heads, segment_ids, slides)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _windows(program):
    return sorted(map(int, re.findall(r"sliding_window_length\\22: (\d+)", program)))


@pytest.mark.parametrize(
    ("options", "calls", "windows"),
    [
        ({}, PLAIN, [0, 0]),
        ({"window": WINDOW}, PLAIN, [WINDOW, WINDOW]),
        ({"window": LENGTH}, PLAIN, [0, 0]),
        # A kernel with the window and one without; the program chooses at run time.
        ({"window": WINDOW, "traced": True}, 2 * PLAIN, [0, 0, WINDOW, WINDOW]),
        ({"segments": True}, WITH_BIAS, [0, 0]),
        ({"segments": True, "window": WINDOW}, WITH_BIAS, [WINDOW, WINDOW]),
    ],
)
def test_the_kernels_of_a_program(options, calls, windows):
    program = _program(**options)
    assert sorted(re.findall(r"__cudnn\$(\w+)", program)) == sorted(calls)
    assert set(re.findall(r"mask_type\\22: \\22(\w+)", program)) == {"CAUSAL"}
    assert _windows(program) == windows
    quadratic = f"{LENGTH}x{LENGTH}"
    assert (quadratic in program) == options.get("segments", False)


@pytest.mark.parametrize(("segments", "calls"), [(False, PLAIN), (True, WITH_BIAS)])
def test_rows_of_odd_length_are_padded(segments, calls):
    program = _program(length=LENGTH - 1, segments=segments)
    assert sorted(re.findall(r"__cudnn\$(\w+)", program)) == sorted(calls)
    assert f"tensor<2x{LENGTH - 1}x4x64xbf16>" in program
    assert (f"{LENGTH}x{LENGTH}" in program) == segments
    assert f"{LENGTH - 1}x{LENGTH - 1}" not in program


def test_layers_of_a_scan_do_not_keep_the_bias():
    layers, rows = 3, 2

    def loss(scales, x, segment_ids):
        def layer(x, scale):
            x = x * scale
            options = {"segment_ids": segment_ids, "implementation": "cudnn"}
            return x + causal_attention(x, x, x, **options), None

        return jax.lax.scan(layer, x, scales)[0].astype(jnp.float32).sum()

    scales = jax.ShapeDtypeStruct((layers,), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((rows, LENGTH, 2, 64), jnp.bfloat16)
    segment_ids = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    traced = jax.jit(jax.grad(loss)).trace(scales, x, segment_ids)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    # The queries are kept for each layer, the bias is there once.
    assert f"tensor<{layers}x{rows}x{LENGTH}x2x64xbf16>" in program
    assert f"tensor<{rows}x1x{LENGTH}x{LENGTH}xbf16>" in program
    assert f"tensor<{layers}x{rows}x1x{LENGTH}x{LENGTH}" not in program


@pytest.mark.parametrize(
    ("remat", "times"), [("dots", 1), ("frozen", 1), ("narrow", 1), ("full", 2)]
)
def test_policies_that_keep_attention_run_its_kernel_once(remat, times):
    def loss(scales, x):
        def layer(x, scale):
            x = x * scale
            return x + causal_attention(x, x, x, segment_ids=None, implementation="cudnn"), None

        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
        return jax.lax.scan(layer, x, scales)[0].astype(jnp.float32).sum()

    scales = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, LENGTH, 2, 64), jnp.bfloat16)
    traced = jax.jit(jax.grad(loss)).trace(scales, x)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"__cudnn\$(\w+)", program)
    assert kernels.count("fmhaSoftmaxBackward") == 1
    assert kernels.count("fmhaSoftmax") == times


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("slides", [None, False, True])
def test_the_kernels_compute_the_same_attention(slides, segments, length, monkeypatch):
    # The kernel needs a GPU; jax's own path for CPUs takes the same arguments.
    reference = jax.nn.dot_product_attention

    def kernel(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return reference(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((2, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]])
    options = {
        "segment_ids": segment_ids[:, :length] if segments else None,
        "window": 3,
        "slides": slides,
        "scale": 0.3,
    }
    found = causal_attention(*inputs, implementation="cudnn", **options)
    expected = causal_attention(*inputs, implementation="xla", **options)
    np.testing.assert_allclose(found, expected, **ROUNDING)


def test_it_cannot_cap_scores():
    with pytest.raises(ValueError, match="cannot cap"):
        _program(softcap=2.0)
