"""Low-rank products of one projection's experts, in the forms that `grouped.py` compares.

    one-hot   the package's form: products with the pairs of all experts, whose low-rank activations
              are multiplied by zero if the expert is not chosen for the slot
    grouped   rows sorted by expert into blocks of one expert each, one block after another
    batched   the same blocks in batched products
    ragged    `jax.lax.ragged_dot` of the sorted rows

The two products are the low-rank activations z = x A, which the one-hot form computes once for all
slots of a token, and their expansion by B. Letters: T tokens, C slots, E experts, R rank. Needs jax
only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.grouped_rows import Groups, Walk, compute_blocks, group_rows, rows_of_block
from moe_jax.layers.tokens import token_product

ONE_HOT, GROUPED, BATCHED, RAGGED = "one-hot", "grouped", "batched", "ragged"
FORMS = (ONE_HOT, GROUPED, BATCHED, RAGGED)
WALKS: dict[str, Walk] = {GROUPED: "loop", BATCHED: "batch"}


def activations(form: str, x: jax.Array, lora_a: jax.Array, choice: jax.Array) -> jax.Array:
    """Computes the low-rank activations of each slot, x A with the A of the slot's expert.

    Args:
      form: one of `FORMS`.
      x: inputs, [T, D].
      lora_a: A of all experts, [D, E, R].
      choice: expert of each slot, [T, C]; E for a slot without an expert.

    Returns:
      Low-rank activations, [C, T, R]; zero for a slot without an expert.
    """
    width, experts, rank = lora_a.shape
    if form == ONE_HOT:
        z = token_product(x, lora_a.reshape(width, experts * rank))
        z = z.reshape(-1, experts, rank)
        return jnp.einsum("ter,tce->ctr", z, _dispatch(choice, experts, x.dtype))
    by_expert = jnp.moveaxis(lora_a, 1, 0)
    if form == RAGGED:
        return _ragged(jnp.broadcast_to(x, (choice.shape[1], *x.shape)), by_expert, choice)
    groups = _groups(choice, experts)
    return compute_blocks(_token_product, WALKS[form], False, x, None, by_expert, groups)


def expansion(
    form: str, product: jax.Array, z: jax.Array, lora_b: jax.Array, choice: jax.Array
) -> jax.Array:
    """Adds to the frozen product the low-rank update of each slot's expert.

    Args:
      form: one of `FORMS`.
      product: frozen product, [T, F].
      z: low-rank activations of all experts, [T, E, R].
      lora_b: B of all experts, [E, R, F].
      choice: expert of each slot, see `activations`.

    Returns:
      Sums, [C, T, F]; the frozen product for a slot without an expert.
    """
    experts, rank, features = lora_b.shape
    if form == ONE_HOT:
        dispatch = _dispatch(choice, experts, z.dtype)
        matrix = lora_b.reshape(experts * rank, features)
        chosen = [z * dispatch[:, slot, :, None] for slot in range(choice.shape[1])]
        return jnp.stack([product + token_product(_flat(rows), matrix) for rows in chosen])
    index = jnp.minimum(choice, experts - 1)[:, :, None]
    rows = jnp.moveaxis(jnp.take_along_axis(z, index, axis=1), 1, 0)
    if form == RAGGED:
        return product[None] + _ragged(rows, lora_b, choice)
    groups = _groups(choice, experts)
    return product[None] + compute_blocks(
        _row_product, WALKS[form], False, None, rows, lora_b, groups
    )


def step_of(form: str, function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns `function` in a form, with the gradients of its last two operands."""

    def step(cotangent: jax.Array, choice: jax.Array, *operands: jax.Array) -> Any:
        *constants, left, right = operands

        def objective(left: jax.Array, right: jax.Array) -> jax.Array:
            return jnp.sum(function(form, *constants, left, right, choice) * cotangent)

        return jax.value_and_grad(objective, argnums=(0, 1))(left, right)

    return step


def _token_product(x: jax.Array, _: None, matrix: jax.Array) -> jax.Array:
    return jnp.dot(x, matrix)


def _row_product(_: None, row: jax.Array, matrix: jax.Array) -> jax.Array:
    return jnp.dot(row, matrix)


def _dispatch(choice: jax.Array, experts: int, dtype: Any) -> jax.Array:
    """One-hot choice of experts, [T, C, E]; zero for a slot without an expert."""
    return jax.nn.one_hot(choice, experts, dtype=dtype)


def _flat(z: jax.Array) -> jax.Array:
    return z.reshape(len(z), -1)


def _groups(choice: jax.Array, experts: int) -> Groups:
    return group_rows(choice, experts, rows_of_block(choice.size, experts))


def _ragged(rows: jax.Array, matrices: jax.Array, choice: jax.Array) -> jax.Array:
    """Multiplies rows [C, T, in] by the matrices of their experts, [E, in, out]."""
    by_row = choice.T.reshape(-1)
    order = jnp.argsort(by_row)
    counts = jnp.sum(by_row[:, None] == jnp.arange(len(matrices))[None], axis=0, dtype=jnp.int32)
    flat = rows.reshape(-1, rows.shape[-1])
    products = jax.lax.ragged_dot(flat[order], matrices, counts)[jnp.argsort(order)]
    return products.reshape(*rows.shape[:2], -1)
