"""The gated delta rule (Gated Delta Networks, arXiv:2412.06464), in chunks of matrix products.

A head keeps a state S [Dk, Dv], a linear map from keys to values. A token with key k, value v,
decay a and rate b first shrinks it, then moves the value stored for its key towards its own, and
reads it with its query q (eq. 10):

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t k_t^T S_{t-1}),    o_t = S_t^T q_t

Within a chunk of C tokens the states are not formed. The corrections u_t = b_t (v_t - ...) follow
from one unit lower triangular system (the WY form with decay, section 3.3), so that all but the
states between chunks is computed for a block of chunks at once. For the backward pass only the
inputs and the states between blocks are kept. Memory is linear in the length of a row.

Letters: K key heads, each of which serves the same number G of consecutive value heads; N chunks of
a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64
"""Largest number of tokens of a chunk."""

CHUNKS = 4
"""Largest number of chunks of a block. A block of one keeps four times the states for the backward
pass; with larger ones the factors of a block take more memory than its states."""

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class DeltaInputs(NamedTuple):
    """Inputs of the rule for each token, in any floating type.

    Attributes:
      query: [B, S, K, Dk], scaled.
      key: [B, S, K, Dk], of unit length.
      value: [B, S, H, Dv] for H = K G value heads.
      log_decay: [B, S, H], at most 0.
      rate: [B, S, H], from 0 to 1.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    log_decay: jax.Array
    rate: jax.Array


def gated_delta_rule(
    inputs: DeltaInputs, begins: jax.Array | None = None, state: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Output of the gated delta rule and the state after the last token.

    Args:
      inputs: the tokens.
      begins: bool [B, S], true at the first token of each sequence, where the state is reset to
        zero. None: no sequence begins in these rows.
      state: float32 [B, H, Dk, Dv] before the first token; None is zero.

    Returns:
      Output [B, S, H, Dv] and state [B, H, Dk, Dv], both float32.
    """
    batch, length, heads, value_width = inputs.value.shape
    key_heads, key_width = inputs.key.shape[2:]
    size = min(CHUNK, 1 << (length - 1).bit_length())
    chunks = -(-length // size)
    blocks = -(-chunks // CHUNKS)
    chunks = -(-chunks // blocks)  # of a block
    padding = blocks * chunks * size - length

    def split(x: jax.Array, heads: tuple[int, ...]) -> jax.Array:
        """`x` [B, S, ...] as [blocks, N, B, *heads, C, ...], with heads before positions."""
        padded = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
        apart = padded.reshape(batch, blocks, chunks, size, *heads, *x.shape[3:])
        return jnp.moveaxis(apart, (1, 2, 3), (0, 1, 3 + len(heads)))

    by_key, by_value = (key_heads,), (key_heads, heads // key_heads)
    shape = (batch, *by_value, key_width, value_width)
    begins = jnp.zeros((batch, length), bool) if begins is None else begins
    tokens = DeltaInputs(
        split(inputs.query, by_key),
        split(inputs.key, by_key),
        split(inputs.value, by_value),
        split(inputs.log_decay, by_value),
        split(inputs.rate, by_value),
    )
    first = jnp.zeros(shape, jnp.float32) if state is None else state.reshape(shape)
    # Inside a scan XLA cannot merge the recomputation with the forward pass anyway.
    block = jax.checkpoint(_block, prevent_cse=False)
    last, output = jax.lax.scan(block, first, (tokens, split(begins, ())))
    output = jnp.moveaxis(output, (0, 1, 5), (1, 2, 3))
    output = output.reshape(batch, -1, heads, value_width)
    return output[:, :length], last.reshape(batch, heads, key_width, value_width)


def _block(state: jax.Array, tokens: tuple[DeltaInputs, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """State after a block of chunks, and its output [N, B, K, G, C, Dv].

    Args:
      state: [B, K, G, Dk, Dv] before the block.
      tokens: inputs, and whether a sequence begins, in chunks (see `_chunk_terms`).
    """
    inputs, begins = jax.tree.map(lambda x: x.astype(jnp.float32), tokens)
    begun = jnp.cumsum(begins, axis=-1)[:, :, None, None]

    def step(state: jax.Array, terms: _ChunkTerms) -> tuple[jax.Array, jax.Array]:
        written = terms.values - _product("bhgck,bhgkv->bhgcv", terms.reads, state)
        output = _product("bhgck,bhgkv->bhgcv", terms.queries, state)
        output = output + _product("bhgcd,bhgdv->bhgcv", terms.scores, written)
        state = state * terms.decay[..., None, None]
        return state + _product("bhgck,bhgcv->bhgkv", terms.keys, written), output

    return jax.lax.scan(step, state, _chunk_terms(inputs, begun))


class _ChunkTerms(NamedTuple):
    """Factors of the recurrence over chunks, float32 [N, B, K, G, ...].

    Attributes:
      values: [..., C, Dv], what the chunk's tokens would write onto a state of zero.
      reads: [..., C, Dk], by which the state before the chunk is subtracted from it.
      queries: [..., C, Dk], that read the state before the chunk.
      scores: [..., C, C], of a chunk's queries and keys.
      keys: [..., C, Dk], that write to the state after the chunk.
      decay: [...], of the state over the chunk.
    """

    values: jax.Array
    reads: jax.Array
    queries: jax.Array
    scores: jax.Array
    keys: jax.Array
    decay: jax.Array


def _chunk_terms(inputs: DeltaInputs, begun: jax.Array) -> _ChunkTerms:
    """Terms of all chunks of a block.

    Args:
      inputs: in chunks: queries and keys [N, B, K, C, Dk], values [N, B, K, G, C, Dv], decay and
        rate [N, B, K, G, C].
      begun: [N, B, 1, 1, C], number of sequences that have begun in the chunk up to each token.
    """
    decay = jnp.cumsum(inputs.log_decay, axis=-1)
    together = jnp.tril(begun[..., :, None] == begun[..., None, :])
    between = decay[..., :, None] - decay[..., None, :]
    # The exponents that the mask removes may be large and positive, also in the gradient.
    between = jnp.where(together, jnp.exp(jnp.where(together, between, 0.0)), 0.0)
    rate = inputs.rate[..., None]
    overlaps = _product("nbhck,nbhdk->nbhcd", inputs.key, inputs.key)[:, :, :, None]
    inverse = unit_lower_inverse(jnp.tril(rate * overlaps * between, -1))
    since_before = jnp.where(begun == 0, jnp.exp(decay), 0.0)[..., None]
    query, key = inputs.query[:, :, :, None], inputs.key[:, :, :, None]
    scores = _product("nbhck,nbhdk->nbhcd", inputs.query, inputs.key)[:, :, :, None]
    return _ChunkTerms(
        values=_product("...cd,...dv->...cv", inverse, rate * inputs.value),
        reads=_product("...cd,...dk->...ck", inverse, rate * since_before * key),
        queries=since_before * query,
        scores=scores * between,
        keys=between[..., -1, :, None] * key,
        decay=since_before[..., -1, 0],
    )


def unit_lower_inverse(strict: jax.Array) -> jax.Array:
    """Inverse of I + A for strictly lower triangular A [..., C, C], C a power of two.

    Inverses of diagonal blocks are joined to those of twice the size, which takes log2 C products
    of batched matrices. (XLA's triangular solve is a library call that the devices of a mesh do not
    divide. The series I - A + A^2 - ... cancels.)
    """
    *batch, size, _ = strict.shape
    inverse = jnp.ones((*batch, size, 1, 1), strict.dtype)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        blocks = strict.reshape(*batch, pairs, 2, width, pairs, 2, width)
        below = jnp.moveaxis(
            jnp.diagonal(blocks[..., :, 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3
        )
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        joint = -_product("...ab,...bc,...cd->...ad", second, below, first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([joint, second], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :, :]
