"""The cross-entropy in chunks: values, gradients and memory."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from tolerances import (
    BFLOAT16_GRADIENT,
    FEW_OPERATIONS_GRADIENT,
    FLOAT16_GRADIENT,
    GRADIENT_ROUNDING,
    ROUNDING,
)

from moe_jax.config.run import MeshConfig
from moe_jax.layers import vocab_loss
from moe_jax.layers.vocab_loss import chunk_positions, token_losses
from moe_jax.layers.vocabulary import logits
from moe_jax.sharding.mesh import make_mesh
from moe_jax.sharding.rules import BATCH_SPEC, RULES

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 7, 5, 11
RNG = np.random.default_rng(0)
X = RNG.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
KERNEL = RNG.standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
TARGETS = RNG.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
# What each loss counts; a row's last positions count nothing, as prompts and padding do.
WEIGHTS = RNG.uniform(0.5, 2.0, (ROWS, LENGTH)).astype(np.float32)
WEIGHTS[1, 4:] = 0.0


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three positions: seven are two chunks, and a third that overlaps the second."""
    monkeypatch.setattr(vocab_loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(vocab_loss, "MIN_CHUNK_TOKENS", 3 * ROWS)
    assert chunk_positions(ROWS, LENGTH, VOCABULARY) == 3


def with_gradient(x, kernel, targets, weights, **settings):
    """Losses without differentiation, and the gradient of their weighted sum to x."""
    losses = token_losses(x, kernel, targets, **settings)
    total = lambda x: jnp.sum(token_losses(x, kernel, targets, **settings) * weights)
    return losses, *jax.value_and_grad(total)(x)


def torch_losses(x, kernel, targets, weights, cap=None):
    """The same in PyTorch, in float64 and with all logits at once."""
    x = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    scores = x @ torch.tensor(np.asarray(kernel, np.float64))
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    flat = torch.tensor(np.asarray(targets)).long().flatten()
    losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), flat, reduction="none")
    total = (losses * torch.tensor(weights).double().flatten()).sum()
    total.backward()
    return losses.detach().numpy().reshape(targets.shape), total.item(), x.grad.numpy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_losses_and_gradients_equal_pytorchs(small_chunks, tied, cap):
    kernel = np.ascontiguousarray(KERNEL.T) if tied else KERNEL
    run = jax.jit(lambda x: with_gradient(x, kernel, TARGETS, WEIGHTS, tied=tied, cap=cap))
    losses, total, gradient = run(X)
    expected, expected_total, expected_gradient = torch_losses(X, KERNEL, TARGETS, WEIGHTS, cap)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, **ROUNDING)
    np.testing.assert_allclose(total, expected_total, **FEW_OPERATIONS_GRADIENT)
    np.testing.assert_allclose(gradient, expected_gradient, **GRADIENT_ROUNDING)
    assert not np.asarray(gradient)[1, 4:].any()
    assert (np.abs(gradient) > 1e-3).sum() > 50


def test_one_chunk_has_no_loop_and_equal_results():
    assert chunk_positions(ROWS, LENGTH, VOCABULARY) == LENGTH
    run = jax.jit(lambda x: with_gradient(x, KERNEL, TARGETS, WEIGHTS))
    assert "while" not in run.lower(X).as_text()
    losses, _, gradient = run(X)
    expected, _, expected_gradient = torch_losses(X, KERNEL, TARGETS, WEIGHTS)
    np.testing.assert_allclose(losses, expected, **ROUNDING)
    np.testing.assert_allclose(gradient, expected_gradient, **GRADIENT_ROUNDING)


def test_bfloat16_rounds_the_gradient_of_the_logits_and_nothing_else(small_chunks):
    x, kernel = (jnp.asarray(array, jnp.bfloat16) for array in (X, KERNEL))
    losses, _, gradient = jax.jit(lambda x: with_gradient(x, kernel, TARGETS, WEIGHTS))(x)
    expected, *_ = torch_losses(x, kernel, TARGETS, WEIGHTS)
    np.testing.assert_allclose(losses, expected, **ROUNDING)
    scores = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    to_scores = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    to_scores -= np.eye(VOCABULARY)[TARGETS]
    rounded = np.asarray(to_scores.astype(jnp.bfloat16), np.float64)
    by_hand = rounded @ np.asarray(kernel, np.float64).T * WEIGHTS[..., None]
    assert gradient.dtype == jnp.bfloat16
    # What is kept and what is given are rounded once each, by at most one part in 256.
    np.testing.assert_allclose(np.asarray(gradient, np.float64), by_hand, **BFLOAT16_GRADIENT)


def test_float16_keeps_gradients_for_the_loss_scale():
    """Gradient for a nearly certain token: every other probability is far below 6e-5."""
    x = jnp.asarray([[[16.0, 1.0]]], jnp.float16)
    others = np.linspace(-1.0, 1.0, 63)
    kernel = jnp.asarray(np.stack([[1.0, *[0.0] * 63], [0.0, *others]]), jnp.float16)
    targets, scale = jnp.zeros((1, 1), jnp.int32), np.full((1, 1), 2.0**16, np.float32)
    # Not compiled as a whole: XLA may leave out roundings between operations.
    gradient = jax.grad(lambda x: jnp.sum(token_losses(x, kernel, targets) * scale))(x)
    _, _, expected = torch_losses(x, kernel, targets, scale)
    assert gradient.dtype == jnp.float16
    # The first, p - 1, is lost in float32's own rounding of numbers near one.
    assert expected[0, 0, 1] / 2**16 < 3e-6
    np.testing.assert_allclose(gradient[..., 1], expected[..., 1], **FLOAT16_GRADIENT)


def test_chunks_by_hand():
    # 64 MiB are 512 tokens of Llama 2's 32,768,000 = 512 * 64000 bytes' and a few more: 524.
    assert chunk_positions(rows=2, length=2048, vocabulary=32000) == 256  # 262 fit: 8 of 256
    # Of a large vocabulary 512 tokens all the same; of a small one everything at once.
    assert chunk_positions(rows=2, length=1000, vocabulary=262144) == 250
    assert chunk_positions(rows=8, length=2048, vocabulary=1024) == 2048
    # More rows than tokens of a chunk: one position of each.
    assert chunk_positions(rows=4096, length=3, vocabulary=262144) == 1


def test_differentiating_the_frozen_kernel_raises():
    loss = lambda kernel: jnp.sum(token_losses(X, kernel, TARGETS))
    with pytest.raises(ValueError, match="the head is frozen"):
        jax.grad(loss)(jnp.asarray(KERNEL))


def plain_losses(x, kernel, targets):
    """Losses through the logits of all positions."""
    scores = logits(x, kernel)
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - chosen


def test_memory_of_the_loss_at_7b_widths():
    """Four rows of 512 tokens at Llama 2's sizes have 250 MiB of logits, in four chunks."""
    rows, length, width, vocabulary = 4, 512, 4096, 32000
    abstract = jax.ShapeDtypeStruct
    shapes = (rows, length, width), (width, vocabulary), (rows, length)
    types = "float32", "float32", "int32"
    arguments = [abstract(s, t) for s, t in zip(shapes, types, strict=True)]
    temporary, operations = {}, {}
    for function in (plain_losses, token_losses):
        total = lambda x, *rest, of=function: jnp.sum(of(x, *rest))
        compiled = jax.jit(jax.value_and_grad(total)).lower(*arguments).compile()
        temporary[function] = compiled.memory_analysis().temp_size_in_bytes
        operations[function] = compiled.cost_analysis()["flops"]
    all_logits = 4 * rows * length * vocabulary
    # The logits and their gradients, of all or of one chunk.
    assert temporary[plain_losses] >= 2 * all_logits
    assert temporary[token_losses] <= 2 * all_logits / 4 + 4 * rows * length * width
    # XLA counts what is in a loop once. Two products with the kernel, none a second time.
    products = 2 * 2 * rows * length * width * vocabulary
    assert products <= 4 * operations[token_losses] <= 1.01 * products


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_devices_that_share_the_vocabulary(sizes, devices, monkeypatch):
    """Equal to one device; no device has a whole row of logits, or those of all positions."""
    rows, length, width, vocabulary = 8, 6, 24, 272
    data, fsdp, tensor = sizes
    own_rows, own_vocabulary = rows // (data * fsdp), vocabulary // tensor
    monkeypatch.setattr(vocab_loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(vocab_loss, "MIN_CHUNK_TOKENS", 2 * own_rows)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, length, width)).astype(np.float32)
    kernel = rng.standard_normal((width, vocabulary)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    weights = rng.uniform(size=(rows, length)).astype(np.float32)
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    by_row, split = (NamedSharding(mesh, s) for s in (BATCH_SPEC, PartitionSpec("fsdp", "tensor")))

    def compiled(function):
        def total(x, kernel, targets, weights):
            losses = function(x, kernel, targets)
            return jnp.sum(losses * weights), losses

        shardings = by_row, split, by_row, by_row
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            run = jax.jit(jax.grad(total, has_aux=True), in_shardings=shardings)
            return run.lower(x, kernel, targets, weights).compile()

    ours = compiled(token_losses)
    gradient, losses = ours(
        *(jax.device_put(a, s) for a, s in ((x, by_row), (kernel, split), (targets, by_row))),
        jax.device_put(weights, by_row),
    )
    expected, _, expected_gradient = torch_losses(x, kernel, targets, weights)
    np.testing.assert_allclose(losses, expected, **ROUNDING)
    np.testing.assert_allclose(gradient, expected_gradient, **GRADIENT_ROUNDING)

    def shapes(executable):
        found = re.findall(r"f32\[([\d,]+)\]", executable.as_text())
        return {tuple(int(size) for size in shape.split(",")) for shape in found}

    def sizes_of(executable, last):
        """Sizes, without the last axis, of all arrays except the kernel that end in `last`."""
        kernels = {width, width // fsdp}
        found = [s for s in shapes(executable) if s[-1] == last and s[0] not in kernels]
        return {np.prod(shape[:-1]) for shape in found}

    assert not sizes_of(ours, vocabulary)
    assert max(sizes_of(ours, own_vocabulary)) == 2 * own_rows
    assert own_rows * length in sizes_of(compiled(plain_losses), own_vocabulary)
