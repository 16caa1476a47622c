"""Activation functions by the names that Hugging Face's `hidden_act` uses, and gating by them."""

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
    """`activation(gate) * up` (arXiv:2002.05202, section 2), of arrays of one shape and type.

    Args:
      activation: of the gate.
      gate: [..., F].
      up: [..., F].
      weight: [..., 1], another factor, of the same type.
    """
    if activation is jax.nn.silu:
        return _gated_silu(gate, up, weight)
    hidden = activation(gate) * up
    return hidden if weight is None else hidden * weight


@jax.custom_jvp
def _gated_silu(gate: jax.Array, up: jax.Array, weight: jax.Array | None) -> jax.Array:
    """`gate up weight / (1 + exp(-gate))`, in float32 but for its result.

    The division comes last because XLA does not repeat one: after it, whoever uses the result
    reads it. Behind `silu(gate) * up` a CPU's loops make it again, for each use, from all that it
    is made of.
    """
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    g, u = gate.astype(wide), up.astype(wide)
    product = g * u if weight is None else g * u * weight.astype(wide)
    return (product / (1.0 + jnp.exp(-g))).astype(gate.dtype)


@_gated_silu.defjvp
def _gated_silu_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, jax.Array, jax.Array | None],
) -> tuple[jax.Array, jax.Array]:
    # By the sigmoid, as the quotient's own derivative is no number where exp(-gate) overflows.
    (gate, up, weight), (gate_dot, up_dot, weight_dot) = primals, tangents
    sigmoid = jax.nn.sigmoid(gate)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    if weight is None or weight_dot is None:
        tangent = up * slope * gate_dot + gate * sigmoid * up_dot
    else:
        tangent = weight * up * slope * gate_dot + weight * gate * sigmoid * up_dot
        tangent += gate * up * sigmoid * weight_dot
    return _gated_silu(gate, up, weight), tangent


# FIXME docstring of the merged layers.soft_cap:
# """Keeps scores within bounds, smoothly."""


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """`cap tanh(x / cap)`: near x where x is small, never beyond `cap` (arXiv:2408.00118, sec. 2).

    Args:
      x: any shape, float32.
      cap: positive.
    """
    return cap * jnp.tanh(x / cap)
