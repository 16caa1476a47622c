"""New tokens of adapters: the rows that they add to the embedding and the head of a base.

The base keeps its shape. The N new tokens of an adapter have consecutive ids from F on, the next id
of the base's tokenizer. Where the base has rows that its tokenizer does not use, F is below V and
new tokens take the place of these rows; otherwise F is V and they follow. In the rows of a batch
that belong to the adapter, the embeddings and the logits of these ids are the adapter's. On a tied
base, the one row of a token serves both.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import AdapterRows, Windows, replace_rows, take_rows, window_of
from moe_jax.layers.frozen import adapter_leaf
from moe_jax.layers.vocabulary import TokenEmbedding, logits
from moe_jax.sharding.axes import EMBED, HIDDEN_AXES, NEW_TOKENS, constrain


class TokenRange(NamedTuple):
    """Ids of the new tokens of an adapter.

    Attributes:
      first: F, the first id.
      stop: the id after the last.
    """

    first: int
    stop: int

    @property
    def size(self) -> int:
        """N."""
        return self.stop - self.first


def token_range(method: AdapterMethod, vocab_size: int) -> TokenRange | None:
    """Ids of the new tokens of an adapter on a base of V tokens; None without new tokens."""
    if not method.new_tokens:
        return None
    first = vocab_size if method.new_token_id is None else method.new_token_id
    return TokenRange(first, first + len(method.new_tokens))


def total_vocab_size(vocab_size: int, methods: Iterable[AdapterMethod]) -> int:
    """Number of logits of a batch of these adapters on a base of V tokens."""
    ranges = (token_range(method, vocab_size) for method in methods)
    return max([vocab_size, *(new.stop for new in ranges if new is not None)])


class NewTokenRows(NamedTuple):
    """Rows of the new tokens of one adapter.

    Attributes:
      embedding: float32 [N, D].
      head: float32 [N, D]; the same array if the base is tied; None for a classifier.
    """

    embedding: jax.Array
    head: jax.Array | None


class _AdapterLeaves(nn.Module):
    """Leaves of one adapter: `embedding` [N, D], and `head` [N, D] if the base has a head.

    They begin as the mean row of the tokens that the base's tokenizer uses, as in transformers'
    `resize_token_embeddings` (`mean_resizing`), without its noise of variance 1e-9.
    """

    new: TokenRange

    @nn.compact
    def __call__(self, table: jax.Array, kernel: jax.Array | None) -> NewTokenRows:
        """Rows of the adapter; its leaves are created from the base's [V, D] and [D, V]."""
        shape = (self.new.size, table.shape[1])

        def mean_row(*_: object) -> jax.Array:
            return _repeated_mean(table[: self.new.first], 0, shape)

        def mean_column(*_: object) -> jax.Array:
            assert kernel is not None
            return _repeated_mean(kernel[:, : self.new.first], 1, shape)

        axes = (NEW_TOKENS, EMBED)
        embedding = adapter_leaf(self, "embedding", mean_row, shape, axes)
        head = None if kernel is None else adapter_leaf(self, "head", mean_column, shape, axes)
        return NewTokenRows(embedding, head)


def _repeated_mean(array: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    return jnp.broadcast_to(jnp.mean(array, axis=axis, dtype=jnp.float32), shape)


class NewTokens(nn.Module):
    """The new tokens of all adapters of a batch, at the path `new_tokens` of their trees.

    Attributes:
      adapter_rows: rows of each adapter.
      vocab_size: V.
    """

    adapter_rows: tuple[AdapterRows, ...]
    vocab_size: int

    @property
    def new(self) -> TokenRange | None:
        """Ids of the new tokens, the same for all adapters that have any; None without any.

        Raises:
          ValueError: the ids differ.
        """
        ranges = {self._range(rows) for rows in self.adapter_rows} - {None}
        if len(ranges) > 1:
            raise ValueError(f"adapters of a batch have different new tokens: {ranges}")
        return next(iter(ranges), None)

    @nn.compact
    def __call__(self, table: jax.Array, kernel: jax.Array | None) -> dict[str, NewTokenRows]:
        """Rows of each adapter with new tokens, by name.

        Args:
          table: embedding of the base, [V, D].
          kernel: head of the base, [D, V]; None if it is tied.
        """
        result = {}
        for rows in self.adapter_rows:
            new = self._range(rows)
            if new is None:
                continue
            has_head = kernel is not None and rows.method.classification is None
            leaves = _AdapterLeaves(new, name=rows.module_name)
            found = leaves(table, kernel if has_head else None)
            is_tied = kernel is None and rows.method.classification is None
            result[rows.name] = found._replace(head=found.embedding) if is_tied else found
        return result

    def _range(self, rows: AdapterRows) -> TokenRange | None:
        return token_range(rows.method, self.vocab_size)


def embedded(
    tokens: jax.Array,
    embedding: TokenEmbedding,
    adapter_rows: Sequence[AdapterRows],
    new: TokenRange,
    new_rows: Mapping[str, NewTokenRows],
    windows: Windows | None = None,
) -> jax.Array:
    """Embeddings [B, S, D] of tokens [B, S], those of new tokens from their adapters.

    Args:
      tokens: token ids.
      embedding: embedding of the base.
      adapter_rows: rows of all adapters of the batch.
      new: ids of the new tokens.
      new_rows: rows of the new tokens, by adapter.
      windows: windows of all adapters; None where their rows are static.
    """
    extended = [rows for rows in adapter_rows if rows.name in new_rows]
    own = {rows.name: take_rows(rows, tokens, window_of(rows, windows)) for rows in extended}
    is_new = {name: (ids >= new.first) & (ids < new.stop) for name, ids in own.items()}
    known = {name: jnp.where(is_new[name], 0, ids) for name, ids in own.items()}
    x = embedding(replace_rows(adapter_rows, tokens, known, windows))
    changed = {}
    for rows in extended:
        # A product, since the sums of a scattered gradient have no fixed order on GPUs.
        one_hot = jax.nn.one_hot(own[rows.name] - new.first, new.size, dtype=x.dtype)
        table = new_rows[rows.name].embedding.astype(x.dtype)
        found = jnp.einsum("bsn,nd->bsd", one_hot, table, precision=jax.lax.Precision.HIGHEST)
        where = is_new[rows.name][..., None]
        former = take_rows(rows, x, window_of(rows, windows))
        changed[rows.name] = jnp.where(where, embedding.scaled(found), former)
    return constrain(replace_rows(adapter_rows, x, changed, windows), HIDDEN_AXES)


def new_logits(
    hidden: jax.Array,
    adapter_rows: Sequence[AdapterRows],
    new_rows: Mapping[str, NewTokenRows],
    cap: float | None,
    windows: Windows | None = None,
) -> dict[str, jax.Array]:
    """Logits of the new tokens, float32 [b, ..., N], by adapter; classifiers have none.

    Args:
      hidden: hidden states of the rows of `adapter_rows`, [B, ..., D].
      adapter_rows: rows of adapters.
      new_rows: rows of the new tokens, by adapter.
      cap: see `layers.vocabulary.logits`.
      windows: as in `embedded`.
    """
    result = {}
    for rows in adapter_rows:
        head = new_rows[rows.name].head if rows.name in new_rows else None
        if head is not None:
            own = take_rows(rows, hidden, window_of(rows, windows))
            result[rows.name] = logits(own, head, tied=True, cap=cap)
    return result


def extended_logits(
    base: jax.Array,
    adapter_rows: Sequence[AdapterRows],
    new: TokenRange,
    of_new_tokens: Mapping[str, jax.Array],
    windows: Windows | None = None,
) -> jax.Array:
    """Logits of the base with those of the new tokens at their ids, [B, ..., max(V, F + N)].

    Rows of adapters without new tokens keep the base's logits, and -inf for ids from V on.

    Args:
      base: logits of the base, float32 [B, ..., V].
      adapter_rows: rows of all adapters of the batch.
      new: ids of the new tokens.
      of_new_tokens: logits of the new tokens, float32 [b, ..., N], by adapter.
      windows: as in `embedded`.
    """
    beyond = max(0, new.stop - base.shape[-1])
    padding = [(0, 0)] * (base.ndim - 1) + [(0, beyond)]
    padded = jnp.pad(base, padding, constant_values=-jnp.inf)
    middle = padded[..., new.first : new.stop]
    middle = replace_rows(adapter_rows, middle, of_new_tokens, windows)
    return jnp.concatenate([padded[..., : new.first], middle, padded[..., new.stop :]], axis=-1)
