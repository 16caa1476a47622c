"""Cross-entropy over the vocabulary without the logits of a whole batch.

A token of Llama 2 has 8 KB of hidden state in bfloat16, but 128 KB of logits in float32 and as much
of their gradient. Logits are therefore computed for a chunk of positions at a time.

The kernel is frozen, so that only the hidden state has a gradient. Up to the cotangent of the loss,
a factor for each position, it follows from the logits:

    d loss[b, s] / d x[b, s] = (softmax(logits[b, s]) - onehot(target[b, s])) W'

It is computed in the forward pass, together with the chunk's logits, and is all that the backward
pass keeps. No logits are computed twice, and the products are those of the plain loss.

New tokens of adapters have logits of their own, `NewLogits`: few, so that they are not divided, and
differentiated as any array.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from moe_jax.layers.vocabulary import logits
from moe_jax.sharding.axes import (
    ACTIVATION_EMBED,
    BATCH,
    HIDDEN_AXES,
    LENGTH,
    VOCAB,
    constrain,
    num_shards,
)

CHUNK_BYTES = 64 * 2**20
"""Maximum bytes of the float32 logits of a chunk on one device."""

MIN_CHUNK_TOKENS = 512
"""Minimum tokens of a chunk on one device; takes precedence over `CHUNK_BYTES`.

Each chunk reads the whole kernel, and computes two FLOPs for each of its elements and tokens. With
fewer tokens the product is bound by memory bandwidth. In bfloat16 the limit is at about 300 tokens
on an H100 (989 TFLOP/s, 3.35 TB/s), 240 on a TPU v5e and 150 on an A100.
"""

_FLOAT16_SCALE = 2.0**14
"""Factor of the gradients of float16 logits before rounding. They are at most 1, and for most
tokens of the vocabulary below float16's smallest normal number, 6e-5."""


class NewLogits(NamedTuple):
    """Logits of new tokens of an adapter, which replace or follow those of the kernel.

    Attributes:
      first: id of the first new token, at most V.
      values: float32 [B, S, N].
    """

    first: int
    values: jax.Array


class _Settings(NamedTuple):
    """Static settings of `token_losses`.

    Attributes:
      tied: see `logits`.
      cap: see `logits`.
      positions: positions of a chunk.
      dtype: dtype of the hidden states and of their gradient.
      first_new: see `NewLogits`; None without new tokens.
    """

    tied: bool
    cap: float | None
    positions: int
    dtype: Any
    first_new: int | None

    @property
    def kept_dtype(self) -> Any:
        """Dtype of the stored gradient; float32 for float16, as the loss scale comes later."""
        return jnp.float32 if self.dtype == jnp.float16 else self.dtype


def token_losses(
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    tied: bool = False,
    cap: float | None = None,
    new: NewLogits | None = None,
) -> jax.Array:
    """Cross-entropy of each position's target in nats, float32 [B, S].

    Equals the cross-entropy of `logits`, in less memory. Differentiable in `x` and `new`. In half
    precision the gradient of the logits is rounded to the dtype of `x` before its product with the
    kernel.

    Args:
      x: hidden states [B, S, D].
      kernel: frozen kernel [D, V]; see `logits`.
      targets: int [B, S], in [0, V), or the id of a new token.
      tied: see `logits`.
      cap: see `logits`.
      new: logits of new tokens; None without any.

    Raises:
      ValueError: the kernel is differentiated.
    """
    rows, length, _ = x.shape
    vocabulary = kernel.shape[0 if tied else 1]
    positions = chunk_positions(rows, length, vocabulary)
    # Gathered along D once for all chunks; still split along V.
    axes = (VOCAB, ACTIVATION_EMBED) if tied else (ACTIVATION_EMBED, VOCAB)
    kernel = constrain(kernel.astype(x.dtype), axes)
    first, values = (None, None) if new is None else new
    return _token_losses(
        _Settings(tied, cap, positions, x.dtype, first), x, kernel, targets, values
    )


def chunk_positions(rows: int, length: int, vocabulary: int) -> int:
    """Positions of a chunk of all rows: as many as fit, in chunks of about equal size.

    Args:
      rows: B, over all devices.
      length: S.
      vocabulary: V, over all devices.
    """
    device_rows = max(1, rows // num_shards(BATCH))
    device_vocabulary = max(1, vocabulary // num_shards(VOCAB))
    tokens = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // (4 * device_vocabulary))
    chunks = math.ceil(length / max(1, tokens // device_rows))
    return math.ceil(length / chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(
    settings: _Settings,
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    new: jax.Array | None,
) -> jax.Array:
    return _chunked_losses(settings, x, kernel, targets, new, differentiate=False).losses


def _forward(
    settings: _Settings, x: Any, kernel: Any, targets: Any, new: Any
) -> tuple[jax.Array, Any]:
    if kernel.perturbed:
        raise ValueError("the head is frozen; to differentiate its kernel, use a loss of `logits`")
    values = None if new is None else new.value
    losses, *gradients = _chunked_losses(
        settings, x.value, kernel.value, targets.value, values, differentiate=True
    )
    return losses, gradients


def _backward(settings: _Settings, gradients: Any, cotangent: Any) -> tuple[Any, ...]:
    if isinstance(cotangent, SymbolicZero):
        return None, None, None, None
    to_x, to_new = (
        None if gradient is None else gradient.astype(jnp.float32) * cotangent[..., None]
        for gradient in gradients
    )
    assert to_x is not None
    return to_x.astype(settings.dtype), None, None, to_new


_token_losses.defvjp(_forward, _backward, symbolic_zeros=True)


class _Losses(NamedTuple):
    """Losses of positions, and the gradient of each loss if it was asked for.

    Attributes:
      losses: float32 [B, S].
      to_x: gradient to its hidden state, [B, S, D].
      to_new: gradient to its logits of new tokens, float32 [B, S, N]; None without new tokens.
    """

    losses: jax.Array
    to_x: jax.Array | None
    to_new: jax.Array | None


def _chunked_losses(
    settings: _Settings,
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    new: jax.Array | None,
    *,
    differentiate: bool,
) -> _Losses:
    """Losses of all positions and, if `differentiate`, their gradients."""
    chunk = functools.partial(_chunk, settings, kernel=kernel, differentiate=differentiate)
    length, count = targets.shape[1], settings.positions
    if count >= length:
        return chunk(x=x, targets=targets, new=new)

    def add(index: jax.Array, results: _Losses) -> _Losses:
        # The last chunk ends with the row, and may overlap with the one before it.
        start = jnp.minimum(index * count, length - count)
        inputs = {"x": x, "targets": targets, "new": new}
        parts = jax.tree.map(
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, count, axis=1), inputs
        )
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1),
            results,
            chunk(**parts),
        )

    to_x = to_new = None
    if differentiate:
        to_x = constrain(jnp.zeros(x.shape, settings.kept_dtype), HIDDEN_AXES)
        to_new = None if new is None else jnp.zeros_like(new)
    results = _Losses(jnp.zeros(targets.shape, jnp.float32), to_x, to_new)
    return jax.lax.fori_loop(0, math.ceil(length / count), add, results)


def _chunk(
    settings: _Settings,
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    new: jax.Array | None,
    differentiate: bool,
) -> _Losses:
    """`_chunked_losses` for the positions of one chunk."""
    cap = settings.cap
    scores = logits(x, kernel, tied=settings.tied, cap=cap)
    scores = constrain(scores, (BATCH, LENGTH, VOCAB))
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    # A comparison instead of a look-up, so that each device reads only its part of the vocabulary.
    is_target = ids == targets[..., None]
    known, first = scores, settings.first_new
    if new is not None:
        assert first is not None
        stop = first + new.shape[-1]
        is_replaced = (ids >= first) & (ids < stop)
        is_target &= ~is_replaced
        known = jnp.where(is_replaced, -jnp.inf, scores)
    largest = jnp.max(known, axis=-1, keepdims=True)
    if new is not None:
        largest = jnp.maximum(largest, jnp.max(new, axis=-1, keepdims=True))
    # Relative to the largest, so that the loss of a nearly certain target, near 0, is not lost in
    # the difference of two large numbers.
    relative = known - largest
    total = jnp.sum(jnp.exp(relative), axis=-1)
    of_target = jnp.sum(jnp.where(is_target, relative, 0.0), axis=-1)
    to_new = None
    if new is not None:
        assert first is not None
        new_ids = first + jax.lax.broadcasted_iota(jnp.int32, new.shape, 2)
        is_new_target = (new_ids == targets[..., None]).astype(jnp.float32)
        total += jnp.sum(jnp.exp(new - largest), axis=-1)
        of_target += jnp.sum(is_new_target * (new - largest), axis=-1)
        to_new = jnp.exp(new - largest) / total[..., None] - is_new_target
    losses = jnp.log(total) - of_target
    if not differentiate:
        return _Losses(losses, None, None)
    gradient = jnp.exp(relative) / total[..., None] - is_target.astype(jnp.float32)
    if cap is not None:  # (c tanh(z / c))' = 1 - tanh(z / c)^2
        gradient = gradient * (1.0 - jnp.square(scores / cap))
    factor = _FLOAT16_SCALE if settings.dtype == jnp.float16 else 1.0
    gradient = (gradient * factor).astype(settings.dtype)
    to_x = jnp.einsum(
        "bsv,vd->bsd" if settings.tied else "bsv,dv->bsd",
        gradient,
        kernel,
        preferred_element_type=settings.kept_dtype,
    )
    return _Losses(losses, constrain(to_x / factor, HIDDEN_AXES), to_new)
