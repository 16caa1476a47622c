"""Rows sorted by expert and computed in blocks, each with the weights of one expert.

An alternative to one-hot products for many experts, measured by `grouped.py`; not in the package.
The rows, C slots of each token, are sorted by expert and split into blocks of n of one expert each,
so that only the last block of an expert is not full. Shapes are static: the number of blocks
suffices for any routing, and no row is dropped.

Letters: T tokens, C slots, E experts, N blocks of n rows. Needs jax only.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Body = Callable[[Any, Any, Any], Any]
"""Computation of a block: a tree of arrays [n, ...] from its rows of `tokens`, its rows of `rows`
and its expert's weights, see `in_groups`."""

Walk = Literal["loop", "batch"]
"""`loop` computes the blocks one after another and adds to the results in place, which suits CPUs;
`batch` computes all at once in batched products."""

MIN_ROWS, MAX_ROWS = 8, 64


class Groups(NamedTuple):
    """Assignment of rows to blocks. Row c T + t is token t in slot c.

    Attributes:
      source: [N, n], row at each place of each block; C T at an empty place.
      expert: [N], expert of each block; arbitrary for an empty block.
      place: [C, T], index of each row among the N n places; N n for a row without an expert.
    """

    source: jax.Array
    expert: jax.Array
    place: jax.Array


def rows_of_block(rows: int, experts: int) -> int:
    """n, a power of two: half of an expert's rows, so that a quarter of the places is empty."""
    size = max(MIN_ROWS, min(MAX_ROWS, rows // (2 * experts)))
    return 1 << (size.bit_length() - 1)


def block_count(rows: int, experts: int, block: int) -> int:
    """N, the maximum number of blocks: each expert with rows may have one that is not full."""
    return (rows + min(rows, experts) * (block - 1)) // block


def group_rows(choice: jax.Array, experts: int, block: int) -> Groups:
    """Sorts rows by expert.

    Args:
      choice: [T, C], each slot's expert; E where no expert takes the token.
      experts: E.
      block: n.
    """
    tokens, slots = choice.shape
    rows = slots * tokens
    by_row = choice.T.reshape(rows)
    order = jnp.argsort(by_row)
    rank = jnp.argsort(order)
    counts = jnp.sum(by_row[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    first_row = jnp.cumsum(counts) - counts
    blocks = -(-counts // block)
    ends = jnp.cumsum(blocks)
    first_block = ends - blocks

    number = jnp.arange(block_count(rows, experts, block))
    ended = jnp.sum(ends <= number[:, None], axis=1)
    expert = jnp.minimum(ended, experts - 1)
    within = (number - first_block[expert])[:, None] * block + jnp.arange(block)
    filled = within < counts[expert][:, None]
    source = order[jnp.where(filled, first_row[expert][:, None] + within, 0)]
    source = jnp.where(filled, source, rows)

    own = jnp.minimum(by_row, experts - 1)
    place = first_block[own] * block + rank - first_row[own]
    place = jnp.where(by_row < experts, place, number.size * block)
    return Groups(source, expert, place.reshape(slots, tokens))


def in_groups(
    body: Body, walk: Walk, summed: bool, tokens: Any, rows: Any, experts: Any, groups: Groups
) -> Any:
    """Applies `body` to each block, and returns the results in the order of the tokens.

    The backward pass keeps only the operands and computes each block again. The gradients of an
    expert's weights are summed over its blocks.

    Args:
      body: computation of a block, the same for all rows.
      walk: order of the blocks.
      summed: True to sum over the slots of a token.
      tokens: a tree of float arrays [T, ...], shared by the slots of a token.
      rows: a tree of float arrays [C, T, ...].
      experts: a tree of float arrays [E, ...].
      groups: see `group_rows`.

    Returns:
      A tree of arrays [T, ...] if `summed`, else [C, T, ...]; zero for rows without an expert.
    """
    return _in_groups(body, walk, summed, tokens, rows, experts, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_groups(
    body: Body, walk: Walk, summed: bool, tokens: Any, rows: Any, experts: Any, groups: Groups
) -> Any:
    def one(source: jax.Array, expert: jax.Array) -> Any:
        return body(*_block(tokens, rows, experts, source, expert))

    if walk == "batch":
        made = jax.vmap(one)(groups.source, groups.expert)
        return jax.tree.map(functools.partial(_gathered, groups, summed), made)
    like = jax.eval_shape(one, groups.source[0], groups.expert[0])
    results = jax.tree.map(functools.partial(_zeros, groups, summed), like)

    def step(results: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        put = functools.partial(_added, groups, summed, at[0])
        return jax.tree.map(put, results, one(*at)), None

    results, _ = jax.lax.scan(step, results, (groups.source, groups.expert))
    return jax.tree.map(functools.partial(_by_slot, groups, summed), results)


def _forward(body: Body, walk: Walk, summed: bool, *operands: Any) -> tuple[Any, Any]:
    return _in_groups(body, walk, summed, *operands), operands


def _backward(
    body: Body, walk: Walk, summed: bool, operands: Any, cotangents: Any
) -> tuple[Any, Any, Any, None]:
    tokens, rows, experts, groups = operands
    row_count = groups.place.size

    def one(source: jax.Array, expert: jax.Array) -> tuple[Any, Any, Any]:
        def own(cotangent: jax.Array) -> jax.Array:
            if not summed:
                cotangent = cotangent.reshape(row_count, *cotangent.shape[2:])
            # Zero at an empty place, which thus contributes to no gradient.
            at = jnp.where(source < row_count, source % len(cotangent), len(cotangent))
            return cotangent.at[at].get(mode="fill", fill_value=0)

        operands = _block(tokens, rows, experts, source, expert)
        return jax.vjp(body, *operands)[1](jax.tree.map(own, cotangents))

    gathered = functools.partial(_gathered, groups)
    if walk == "batch":
        of_tokens, of_rows, of_experts = jax.vmap(one)(groups.source, groups.expert)
        return (
            jax.tree.map(functools.partial(gathered, True), of_tokens),
            jax.tree.map(functools.partial(gathered, False), of_rows),
            jax.tree.map(functools.partial(_of_expert, groups), of_experts, experts),
            None,
        )

    def step(totals: tuple[Any, ...], at: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        source, expert = at
        of_tokens, of_rows, of_experts = one(*at)
        add = functools.partial(_added, groups)
        return (
            jax.tree.map(functools.partial(add, True, source), totals[0], of_tokens),
            jax.tree.map(functools.partial(add, False, source), totals[1], of_rows),
            jax.tree.map(lambda total, own: total.at[expert].add(own), totals[2], of_experts),
        ), None

    flat = jax.tree.map(lambda array: array.reshape(row_count, *array.shape[2:]), rows)
    zeros = jax.tree.map(jnp.zeros_like, (tokens, flat, experts))
    totals, _ = jax.lax.scan(step, zeros, (groups.source, groups.expert))
    of_tokens, of_rows, of_experts = totals
    of_rows = jax.tree.map(functools.partial(_by_slot, groups, False), of_rows)
    return of_tokens, of_rows, of_experts, None


_in_groups.defvjp(_forward, _backward)


def _block(
    tokens: Any, rows: Any, experts: Any, source: jax.Array, expert: jax.Array
) -> tuple[Any, Any, Any]:
    """Operands of one block; an empty place reads those of another row."""

    def take(array: jax.Array) -> jax.Array:
        return array.at[source % len(array)].get(mode="promise_in_bounds")

    flat = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), rows)
    own = jax.tree.map(lambda array: array.at[expert].get(mode="promise_in_bounds"), experts)
    return jax.tree.map(take, tokens), jax.tree.map(take, flat), own


def _zeros(groups: Groups, summed: bool, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Results of all tokens, or of all rows: of `like` [n, ...], [T, ...] or [C T, ...]."""
    slots, tokens = groups.place.shape
    return jnp.zeros((tokens if summed else slots * tokens, *like.shape[1:]), like.dtype)


def _added(
    groups: Groups, summed: bool, source: jax.Array, results: jax.Array, block: jax.Array
) -> jax.Array:
    """The results with those of a block added."""
    row_count = groups.place.size
    at = jnp.where(source < row_count, source % len(results), len(results)) if summed else source
    return results.at[at].add(block, mode="drop")


def _by_slot(groups: Groups, summed: bool, results: jax.Array) -> jax.Array:
    """[C T, ...] as [C, T, ...], unless slots are summed."""
    return results if summed else results.reshape(*groups.place.shape, *results.shape[1:])


def _gathered(groups: Groups, summed: bool, made: jax.Array) -> jax.Array:
    """Results in blocks, [N, n, ...], as [C, T, ...], or summed over slots as [T, ...]."""
    flat = made.reshape(-1, *made.shape[2:])
    slots = [flat.at[place].get(mode="fill", fill_value=0) for place in groups.place]
    return functools.reduce(jnp.add, slots) if summed else jnp.stack(slots)


def _of_expert(groups: Groups, of_blocks: jax.Array, like: jax.Array) -> jax.Array:
    """Sums over the blocks of each expert, [N, ...] to [E, ...]."""
    return jax.ops.segment_sum(of_blocks, groups.expert, len(like), indices_are_sorted=True)
