"""DoRA: length and direction of a weight's columns, trained apart (arXiv:2402.09353, eq. 5).

The adapted weight is `m * V / ||V||` with `V = W + s A B`, norms taken over each column (one output
feature), and m, the magnitude, trained. Norms are constants to the gradient, as in the paper's
section 4.3. With `gains = m / ||V||` an adapted product is `gains * (x W + s (x A) B)`, so that
gains of one leave the projection as it is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.leaf import adapter_leaf
from moe_jax.sharding.axes import EXPERTS


def column_norms(
    kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, scale: float
) -> jax.Array:
    """Lengths of the columns of `W + s A_e B_e` for every expert, float32 [E, out].

    No expert's weight-sized `A_e B_e` is made:

        ||W + s A B||^2 = ||W||^2 + 2 s sum_r (A' W) * B + s^2 sum_r ((A' A) B) * B

    a constant, a cross term with one thin product, and a term of rank size. The cost is one thin
    product of the kernel with E R columns, in * out * E * R multiply-adds however many tokens there
    are, and nothing in the backward pass.

    Args:
      kernel: W, [in, out].
      lora_a: [in, E, R].
      lora_b: [E, R, out].
      scale: s.
    """
    kernel = jax.lax.stop_gradient(kernel)
    lora_a, lora_b = jax.lax.stop_gradient((lora_a, lora_b))
    own = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0)
    cross = jnp.einsum(
        "der,df->erf", lora_a, kernel, preferred_element_type=jnp.float32, precision="highest"
    )
    gram = jnp.einsum("der,des->ers", lora_a, lora_a, precision="highest")
    inner = jnp.einsum("ers,esf->erf", gram, lora_b, precision="highest")
    square = own + jnp.sum((2.0 * scale * cross + scale**2 * inner) * lora_b, axis=1)
    # The three terms cancel where A B nearly undoes a column of W.
    return jnp.sqrt(jnp.maximum(square, 1e-12))


def dora_gains(
    module: nn.Module,
    kernel: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    scale: float,
    axis: str,
) -> jax.Array:
    """`m / ||W + s A_e B_e||`, float32 [E, out]; ones at the start.

    Makes the leaf `magnitude` of `module`, [E, out], the lengths of W's own columns at first.

    Args:
      module: the module that owns the pairs.
      kernel: W, [in, out].
      lora_a: [in, E, R].
      lora_b: [E, R, out].
      scale: s.
      axis: logical axis of the projection's outputs.
    """
    norms = column_norms(kernel, lora_a, lora_b, scale)
    start = lambda *_: norms  # B is zero then
    magnitude = adapter_leaf(module, "magnitude", start, norms.shape, (EXPERTS, axis))
    return magnitude / norms
