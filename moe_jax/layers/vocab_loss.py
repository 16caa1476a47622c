"""Cross-entropy over the vocabulary without the logits of a whole batch.

Beside a model of width D, the logits of a vocabulary of V are many: a token of Llama 2 has 8 KB of
hidden state in bfloat16, and 128 KB of logits in float32, and as much again of their gradients. So
logits are made for a few positions at a time and are gone before the next.

With the kernel frozen, all that the backward pass has to give is the gradient to the hidden state,
and up to one factor for each position it is known as soon as the logits are:

    d loss[b, s] / d x[b, s] = (softmax(logits[b, s]) - onehot(target[b, s])) W'

It is computed there and then, while the chunk's logits are at hand, and is all that is kept. So no
logits are computed twice, and the products are those of the plain loss.
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
    parts,
)

CHUNK_BYTES = 64 * 2**20
"""Size that the float32 logits of a chunk may have on one device."""

LEAST_CHUNK_TOKENS = 512
"""Tokens of a chunk on one device, whatever its logits take.

Each chunk reads the whole kernel: two operations for each of its numbers and token, so that with
fewer tokens reading takes longer than multiplying. In bfloat16 the two are even at about 300 tokens
on an H100 (989 TFLOP/s, 3.35 TB/s), 240 on a TPU v5e, 150 on an A100.
"""

_FLOAT16_SCALE = 2.0**14
"""What gradients of float16 logits are multiplied by before they are rounded: they are at most 1
but for most tokens of the vocabulary below float16's least normal number, 6e-5."""


class _Settings(NamedTuple):
    """What is static; see `token_losses`.

    Attributes:
      positions: of a chunk.
      dtype: of the hidden states and of their gradient.
    """

    tied: bool
    cap: float | None
    positions: int
    dtype: Any

    @property
    def kept_dtype(self) -> Any:
        """Of what is kept for the backward pass, before the loss scale has saved it in float16."""
        return jnp.float32 if self.dtype == jnp.float16 else self.dtype


def token_losses(
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    tied: bool = False,
    cap: float | None = None,
) -> jax.Array:
    """Cross-entropy in nats of the token that each position predicts, float32 [B, S].

    As `logits` and a log-softmax over V give it, but for memory. Differentiable in `x` alone. In
    half precision the gradient to the logits is rounded to the type of `x` before it is multiplied
    with the kernel.

    Args:
      x: hidden states [B, S, D].
      kernel: frozen, [D, V]; see `logits`.
      targets: int [B, S], in [0, V).
      tied: see `logits`.
      cap: see `logits`.

    Raises:
      ValueError: the kernel is to be differentiated.
    """
    rows, length, _ = x.shape
    vocabulary = kernel.shape[0 if tied else 1]
    positions = chunk_positions(rows, length, vocabulary)
    # Whole along D on every device, once for all chunks; still split along V.
    axes = (VOCAB, ACTIVATION_EMBED) if tied else (ACTIVATION_EMBED, VOCAB)
    kernel = constrain(kernel.astype(x.dtype), axes)
    return _token_losses(_Settings(tied, cap, positions, x.dtype), x, kernel, targets)


def chunk_positions(rows: int, length: int, vocabulary: int) -> int:
    """How many positions of all rows are a chunk: as many as fit, in chunks of about equal size.

    Args:
      rows: B, of all devices.
      length: S.
      vocabulary: V, of all devices.
    """
    own_rows = max(1, rows // parts(BATCH))
    own_vocabulary = max(1, vocabulary // parts(VOCAB))
    tokens = max(LEAST_CHUNK_TOKENS, CHUNK_BYTES // (4 * own_vocabulary))
    chunks = math.ceil(length / max(1, tokens // own_rows))
    return math.ceil(length / chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(
    settings: _Settings, x: jax.Array, kernel: jax.Array, targets: jax.Array
) -> jax.Array:
    return _by_chunks(settings, x, kernel, targets, differentiate=False)[0]


def _forward(settings: _Settings, x: Any, kernel: Any, targets: Any) -> tuple[jax.Array, Any]:
    if kernel.perturbed:
        raise ValueError("the head is frozen here; differentiate the loss of its logits instead")
    return _by_chunks(settings, x.value, kernel.value, targets.value, differentiate=True)


def _backward(settings: _Settings, gradient: Any, cotangent: Any) -> tuple[Any, None, None]:
    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    return (gradient * cotangent[..., None]).astype(settings.dtype), None, None


_token_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _by_chunks(
    settings: _Settings,
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    differentiate: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """The losses [B, S], and each one's gradient to its hidden state [B, S, D] if asked for."""
    chunk = functools.partial(_chunk, settings, kernel=kernel, differentiate=differentiate)
    length, count = targets.shape[1], settings.positions
    if count >= length:
        return chunk(x=x, targets=targets)

    def add(index: jax.Array, found: Any) -> Any:
        # The last chunk ends with the row, and does again a few positions of the one before it.
        start = jnp.minimum(index * count, length - count)
        own_x, own_targets = (
            jax.lax.dynamic_slice_in_dim(array, start, count, axis=1) for array in (x, targets)
        )
        made = chunk(x=own_x, targets=own_targets)
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1),
            found,
            made,
        )

    losses = jnp.zeros(targets.shape, jnp.float32)
    gradient = None
    if differentiate:
        gradient = constrain(jnp.zeros(x.shape, settings.kept_dtype), HIDDEN_AXES)
    return jax.lax.fori_loop(0, math.ceil(length / count), add, (losses, gradient))


def _chunk(
    settings: _Settings,
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    differentiate: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`_by_chunks` of positions whose logits are made at once."""
    cap = settings.cap
    scores = logits(x, kernel, tied=settings.tied, cap=cap)
    scores = constrain(scores, (BATCH, LENGTH, VOCAB))
    # A comparison, and no look-up, leaves each device with its own part of the vocabulary.
    is_target = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2) == targets[..., None]
    # Relative to the largest one: a target that is nearly certain has a loss near 0, which would be
    # lost in the difference of two large numbers.
    relative = scores - jnp.max(scores, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(relative), axis=-1)
    losses = jnp.log(total) - jnp.sum(jnp.where(is_target, relative, 0.0), axis=-1)
    if not differentiate:
        return losses, None
    gradient = jnp.exp(relative) / total[..., None] - is_target
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
    return losses, constrain(to_x / factor, HIDDEN_AXES)
