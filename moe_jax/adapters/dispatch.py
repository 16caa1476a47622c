"""Experts as rank-sized codes: the products that every mixture of LoRA experts is made of.

The experts of one projection are low-rank deltas on one shared matrix, so it is their codes
`x A_e`, R numbers each, that are dispatched, and not the tokens. All shapes are static; there is no
gather, scatter, sort or dropped token. CONTRIBUTING.md has the algebra.
"""

import jax
import jax.numpy as jnp


def expert_codes(x: jax.Array, lora_a: jax.Array) -> jax.Array:
    """The codes of every expert in one thin product.

    Args:
      x: [B, S, D].
      lora_a: [D, E, R]; the expert axis stands before the rank so that no transpose is needed.

    Returns:
      [B, S, E, R] in the type of `x`.
    """
    width, experts, rank = lora_a.shape
    codes = jnp.dot(x, lora_a.astype(x.dtype).reshape(width, experts * rank))
    return codes.reshape(*x.shape[:-1], experts, rank)


def select_codes(codes: jax.Array, select: jax.Array) -> jax.Array:
    """Codes [B, S, E, R] times `select` [B, S, E]: one-hot for a slot's expert, or weights."""
    return codes * select.astype(codes.dtype)[..., None]


def expand_codes(codes: jax.Array, lora_b: jax.Array) -> jax.Array:
    """Sum over experts of `codes_e B_e`, in one product.

    Args:
      codes: [B, S, E, R], already selected.
      lora_b: [E, R, F].

    Returns:
      [B, S, F] in the type of `codes`.
    """
    experts, rank, features = lora_b.shape
    flat = codes.reshape(*codes.shape[:-2], experts * rank)
    return jnp.dot(flat, lora_b.astype(codes.dtype).reshape(experts * rank, features))
