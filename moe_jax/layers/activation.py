"""Activation functions by Hugging Face's names for `hidden_act`, gated units, and scales."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def gated(
    activation: Callable[[jax.Array], jax.Array],
    gate: jax.Array,
    up: jax.Array,
    weight: jax.Array | None = None,
) -> jax.Array:
    """Gated activation `activation(gate) * up` (arXiv:2002.05202, section 2).

    Args:
      activation: activation function of the gate.
      gate: [..., F].
      up: [..., F], of the same dtype.
      weight: optional factor [..., 1], of the same dtype.
    """
    if activation is jax.nn.silu:
        return _gated_silu(gate, up, weight)
    hidden = activation(gate) * up
    return hidden if weight is None else hidden * weight


@jax.custom_jvp
def _gated_silu(gate: jax.Array, up: jax.Array, weight: jax.Array | None) -> jax.Array:
    """`gate * up * weight / (1 + exp(-gate))`, computed in float32 at least.

    The division comes last because XLA never duplicates a division into the loops that use its
    result. On CPUs it does duplicate `silu(gate) * up`, and computes it once for each use.
    """
    wide = jnp.float64 if gate.dtype == jnp.float64 else jnp.float32
    g, u = gate.astype(wide), up.astype(wide)
    product = g * u if weight is None else g * u * weight.astype(wide)
    return (product / (1.0 + jnp.exp(-g))).astype(gate.dtype)


@_gated_silu.defjvp
def _gated_silu_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, jax.Array, jax.Array | None],
) -> tuple[jax.Array, jax.Array]:
    # Not the derivative of the quotient, which is NaN if exp(-gate) overflows.
    (gate, up, weight), (gate_dot, up_dot, weight_dot) = primals, tangents
    sigmoid = jax.nn.sigmoid(gate)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    if weight is None or weight_dot is None:
        tangent = up * slope * gate_dot + gate * sigmoid * up_dot
    else:
        tangent = weight * up * slope * gate_dot + weight * gate * sigmoid * up_dot
        tangent += gate * up * sigmoid * weight_dot
    return _gated_silu(gate, up, weight), tangent


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """`factor * x` in the dtype of `x`; rounded once, since 0.22 itself is not a bfloat16."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Smooth bound `cap * tanh(x / cap)` of logits or attention scores (arXiv:2408.00118, sec. 2).

    Args:
      x: any shape, float32.
      cap: bound of the absolute value, positive.
    """
    return cap * jnp.tanh(x / cap)
