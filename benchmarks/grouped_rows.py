"""Rows sorted by expert and computed in blocks, each with the weights of one expert.

An alternative to one-hot products for many experts, measured by `grouped.py`; not in the package.
The rows, C slots of each token, are sorted by expert and split into blocks of n rows of one expert,
so that only the last block of an expert can have empty places. Shapes are static: the number of
blocks suffices for any routing, and no row is dropped.

Letters: T tokens, C slots, E experts, N blocks of n rows. Needs jax only.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Body = Callable[[Any, Any, Any], Any]
"""Computation of a block: maps its rows of `tokens`, its rows of `rows` and its expert's weights to
a tree of arrays [n, ...], see `compute_blocks`."""

Walk = Literal["loop", "batch"]
"""Order of the blocks. `loop` computes one block after another and adds to the results in place,
which suits CPUs; `batch` computes all blocks in batched products."""

MIN_ROWS, MAX_ROWS = 8, 64


class Groups(NamedTuple):
    """Assignment of rows to blocks. Row c T + t is token t in slot c.

    Attributes:
      source: row at each place of each block, [N, n]; C T at an empty place.
      expert: expert of each block, [N]; arbitrary for an empty block.
      place: index of each row among the N n places, [C, T]; N n for a row without an expert.
    """

    source: jax.Array
    expert: jax.Array
    place: jax.Array


def rows_of_block(rows: int, experts: int) -> int:
    """Number of rows n of a block: half of the mean rows of an expert, as a power of two."""
    size = max(MIN_ROWS, min(MAX_ROWS, rows // (2 * experts)))
    return 1 << (size.bit_length() - 1)


def block_count(rows: int, experts: int, block: int) -> int:
    """Maximum number of blocks N: each expert with rows may have one block with empty places."""
    return (rows + min(rows, experts) * (block - 1)) // block


def group_rows(choice: jax.Array, experts: int, block: int) -> Groups:
    """Sorts rows by expert and assigns them to blocks.

    Args:
      choice: expert of each slot, [T, C]; E for a slot without an expert.
      experts: number of experts E.
      block: number of rows n of a block.
    """
    tokens, slots = choice.shape
    rows = slots * tokens
    by_row = choice.T.reshape(rows)
    order = jnp.argsort(by_row)
    rank = jnp.argsort(order)
    counts = jnp.sum(by_row[:, None] == jnp.arange(experts)[None], axis=0, dtype=jnp.int32)
    first_row = jnp.cumsum(counts) - counts
    blocks = -(-counts // block)
    ends = jnp.cumsum(blocks)
    first_block = ends - blocks

    number = jnp.arange(block_count(rows, experts, block))
    expert = jnp.minimum(jnp.sum(ends[None] <= number[:, None], axis=1), experts - 1)
    offset = (number - first_block[expert])[:, None] * block + jnp.arange(block)[None]
    filled = offset < counts[expert][:, None]
    source = order[jnp.where(filled, first_row[expert][:, None] + offset, 0)]
    source = jnp.where(filled, source, rows)

    index = jnp.minimum(by_row, experts - 1)
    place = first_block[index] * block + rank - first_row[index]
    place = jnp.where(by_row < experts, place, number.size * block)
    return Groups(source, expert, place.reshape(slots, tokens))


def compute_blocks(
    body: Body, walk: Walk, summed: bool, tokens: Any, rows: Any, experts: Any, groups: Groups
) -> Any:
    """Applies `body` to each block and returns the results in the order of the tokens.

    Only the operands are kept for the backward pass, which recomputes each block. The gradients of
    an expert's weights are summed over its blocks.

    Args:
      body: computation of a block, the same for all rows.
      walk: order of the blocks.
      summed: True to sum the results over the slots of a token.
      tokens: a tree of float arrays [T, ...], shared by the slots of a token.
      rows: a tree of float arrays [C, T, ...].
      experts: a tree of float arrays [E, ...].
      groups: assignment of rows to blocks, see `group_rows`.

    Returns:
      A tree of arrays [T, ...] if `summed`, else [C, T, ...]; zero for rows without an expert.
    """
    return _compute_blocks(body, walk, summed, tokens, rows, experts, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _compute_blocks(
    body: Body, walk: Walk, summed: bool, tokens: Any, rows: Any, experts: Any, groups: Groups
) -> Any:
    def apply(source: jax.Array, expert: jax.Array) -> Any:
        return body(*_block(tokens, rows, experts, source, expert))

    if walk == "batch":
        blocks = jax.vmap(apply)(groups.source, groups.expert)
        return jax.tree.map(functools.partial(_gathered, groups, summed), blocks)
    like = jax.eval_shape(apply, groups.source[0], groups.expert[0])
    results = jax.tree.map(functools.partial(_zeros, groups, summed), like)

    def step(results: Any, block: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        add = functools.partial(_added, groups, summed, block[0])
        return jax.tree.map(add, results, apply(*block)), None

    results, _ = jax.lax.scan(step, results, (groups.source, groups.expert))
    return jax.tree.map(functools.partial(_split_slots, groups, summed), results)


def _forward(body: Body, walk: Walk, summed: bool, *operands: Any) -> tuple[Any, Any]:
    return _compute_blocks(body, walk, summed, *operands), operands


def _backward(
    body: Body, walk: Walk, summed: bool, operands: Any, cotangents: Any
) -> tuple[Any, Any, Any, None]:
    tokens, rows, experts, groups = operands
    row_count = groups.place.size

    def pull_back(source: jax.Array, expert: jax.Array) -> tuple[Any, Any, Any]:
        def block_rows(cotangent: jax.Array) -> jax.Array:
            if not summed:
                cotangent = cotangent.reshape(row_count, *cotangent.shape[2:])
            # Zero at an empty place, which contributes to no gradient.
            index = jnp.where(source < row_count, source % len(cotangent), len(cotangent))
            return cotangent.at[index].get(mode="fill", fill_value=0)

        operands = _block(tokens, rows, experts, source, expert)
        return jax.vjp(body, *operands)[1](jax.tree.map(block_rows, cotangents))

    gathered = functools.partial(_gathered, groups)
    if walk == "batch":
        token_gradients, row_gradients, expert_gradients = jax.vmap(pull_back)(
            groups.source, groups.expert
        )
        return (
            jax.tree.map(functools.partial(gathered, True), token_gradients),
            jax.tree.map(functools.partial(gathered, False), row_gradients),
            jax.tree.map(functools.partial(_summed_by_expert, groups), expert_gradients, experts),
            None,
        )

    def step(totals: tuple[Any, ...], block: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        source, expert = block
        token_gradients, row_gradients, expert_gradients = pull_back(*block)
        add = functools.partial(_added, groups)
        return (
            jax.tree.map(functools.partial(add, True, source), totals[0], token_gradients),
            jax.tree.map(functools.partial(add, False, source), totals[1], row_gradients),
            jax.tree.map(
                lambda total, part: total.at[expert].add(part), totals[2], expert_gradients
            ),
        ), None

    flat = jax.tree.map(lambda array: array.reshape(row_count, *array.shape[2:]), rows)
    zeros = jax.tree.map(jnp.zeros_like, (tokens, flat, experts))
    totals, _ = jax.lax.scan(step, zeros, (groups.source, groups.expert))
    token_gradients, row_gradients, expert_gradients = totals
    row_gradients = jax.tree.map(functools.partial(_split_slots, groups, False), row_gradients)
    return token_gradients, row_gradients, expert_gradients, None


_compute_blocks.defvjp(_forward, _backward)


def _block(
    tokens: Any, rows: Any, experts: Any, source: jax.Array, expert: jax.Array
) -> tuple[Any, Any, Any]:
    """Operands of one block; an empty place reads the operands of an arbitrary row."""

    def take(array: jax.Array) -> jax.Array:
        return array.at[source % len(array)].get(mode="promise_in_bounds")

    flat = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), rows)
    weights = jax.tree.map(lambda array: array.at[expert].get(mode="promise_in_bounds"), experts)
    return jax.tree.map(take, tokens), jax.tree.map(take, flat), weights


def _zeros(groups: Groups, summed: bool, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zero results of all tokens [T, ...] or all rows [C T, ...], like a block's [n, ...]."""
    slots, tokens = groups.place.shape
    return jnp.zeros((tokens if summed else slots * tokens, *like.shape[1:]), like.dtype)


def _added(
    groups: Groups, summed: bool, source: jax.Array, results: jax.Array, block: jax.Array
) -> jax.Array:
    """Adds the results of a block to the results of all rows."""
    row_count = groups.place.size
    index = source
    if summed:
        index = jnp.where(source < row_count, source % len(results), len(results))
    return results.at[index].add(block, mode="drop")


def _split_slots(groups: Groups, summed: bool, results: jax.Array) -> jax.Array:
    """Reshapes [C T, ...] to [C, T, ...], unless slots are summed."""
    return results if summed else results.reshape(*groups.place.shape, *results.shape[1:])


def _gathered(groups: Groups, summed: bool, blocks: jax.Array) -> jax.Array:
    """Gathers results in blocks, [N, n, ...], to [C, T, ...], or sums over slots to [T, ...]."""
    flat = blocks.reshape(-1, *blocks.shape[2:])
    slots = [flat.at[place].get(mode="fill", fill_value=0) for place in groups.place]
    return functools.reduce(jnp.add, slots) if summed else jnp.stack(slots)


def _summed_by_expert(groups: Groups, block_gradients: jax.Array, like: jax.Array) -> jax.Array:
    """Sums gradients over the blocks of each expert, [N, ...] to [E, ...]."""
    return jax.ops.segment_sum(block_gradients, groups.expert, len(like), indices_are_sorted=True)
