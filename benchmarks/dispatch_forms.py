"""Low-rank products of one projection's experts, in each form that `grouped.py` compares.

    one-hot   the package's: products with the pairs of all experts; the low-rank activations of
              experts that do not serve a slot are multiplied by zero
    grouped   rows sorted by expert, in blocks that have one, block after block
    batched   the same blocks all at once
    ragged    `jax.lax.ragged_dot` of the sorted rows

The two products are the low-rank activations z = x A, which the one-hot form computes once for all
slots of a token, and their expansion by B. Letters: T tokens, C slots, E experts, R rank. Needs jax
only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.grouped_rows import Groups, Walk, group_rows, in_groups, rows_of_block
from moe_jax.layers.tokens import token_product

ONE_HOT, GROUPED, BATCHED, RAGGED = "one-hot", "grouped", "batched", "ragged"
FORMS = (ONE_HOT, GROUPED, BATCHED, RAGGED)
WALKS: dict[str, Walk] = {GROUPED: "loop", BATCHED: "batch"}


def activations(form: str, x: jax.Array, lora_a: jax.Array, choice: jax.Array) -> jax.Array:
    """Low-rank activations of each slot: `x A` with its expert's A.

    Args:
      form: of `FORMS`.
      x: [T, D].
      lora_a: [D, E, R].
      choice: [T, C], each slot's expert; E where there is none.

    Returns:
      [C, T, R], zero where there is no expert.
    """
    width, experts, rank = lora_a.shape
    if form == ONE_HOT:
        of_all = token_product(x, lora_a.reshape(width, experts * rank))
        of_all = of_all.reshape(-1, experts, rank)
        return jnp.einsum("ter,tce->ctr", of_all, _dispatch(choice, experts, x.dtype))
    by_expert = jnp.moveaxis(lora_a, 1, 0)
    if form == RAGGED:
        return _ragged(jnp.broadcast_to(x, (choice.shape[1], *x.shape)), by_expert, choice)
    groups = _groups(choice, experts)
    return in_groups(_of_token, WALKS[form], False, x, None, by_expert, groups)


def expansion(
    form: str, product: jax.Array, z: jax.Array, lora_b: jax.Array, choice: jax.Array
) -> jax.Array:
    """The frozen product plus the low-rank update of the expert in each slot.

    Args:
      form: of `FORMS`.
      product: [T, F].
      z: low-rank activations of all experts, [T, E, R].
      lora_b: [E, R, F].
      choice: as in `activations`.

    Returns:
      [C, T, F], the product alone where there is no expert.
    """
    experts, rank, features = lora_b.shape
    if form == ONE_HOT:
        dispatch = _dispatch(choice, experts, z.dtype)
        matrix = lora_b.reshape(experts * rank, features)
        chosen = [z * dispatch[:, slot, :, None] for slot in range(choice.shape[1])]
        return jnp.stack([product + token_product(_flat(own), matrix) for own in chosen])
    own = jnp.minimum(choice, experts - 1)[:, :, None]
    rows = jnp.moveaxis(jnp.take_along_axis(z, own, axis=1), 1, 0)
    if form == RAGGED:
        return product + _ragged(rows, lora_b, choice)
    groups = _groups(choice, experts)
    return product + in_groups(_of_row, WALKS[form], False, None, rows, lora_b, groups)


def step_of(form: str, function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """`activations` or `expansion`, forward and backward to its last two float operands."""

    def step(cotangent: jax.Array, choice: jax.Array, *operands: jax.Array) -> Any:
        *constants, left, right = operands

        def objective(left: jax.Array, right: jax.Array) -> jax.Array:
            return jnp.sum(function(form, *constants, left, right, choice) * cotangent)

        return jax.value_and_grad(objective, argnums=(0, 1))(left, right)

    return step


def _of_token(x: jax.Array, _: None, matrix: jax.Array) -> jax.Array:
    return jnp.dot(x, matrix)


def _of_row(_: None, row: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.dot(row, matrix)


def _dispatch(choice: jax.Array, experts: int, dtype: Any) -> jax.Array:
    """[T, C, E], all zeros where there is no expert."""
    return jax.nn.one_hot(choice, experts, dtype=dtype)


def _flat(z: jax.Array) -> jax.Array:
    return z.reshape(len(z), -1)


def _groups(choice: jax.Array, experts: int) -> Groups:
    return group_rows(choice, experts, rows_of_block(choice.size, experts))


def _ragged(rows: jax.Array, matrices: jax.Array, choice: jax.Array) -> jax.Array:
    """[C, T, in] rows times their experts' matrices [E, in, out]."""
    by_row = choice.T.reshape(-1)
    order = jnp.argsort(by_row)
    counts = jnp.sum(by_row[:, None] == jnp.arange(len(matrices)), axis=0, dtype=jnp.int32)
    flat = rows.reshape(-1, rows.shape[-1])
    made = jax.lax.ragged_dot(flat[order], matrices, counts)[jnp.argsort(order)]
    return made.reshape(*rows.shape[:2], -1)
