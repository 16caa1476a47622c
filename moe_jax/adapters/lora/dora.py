"""DoRA: magnitude and direction of a weight's columns, trained apart (arXiv:2402.09353, eq. 5).

The adapted weight is `m * V / ||V||` with `V = W + s A B`. Norms are taken of each column (one
output feature), and the magnitude m is trained. It starts as the norms of W, so that an untrained
adapter equals the base model. Gradients treat the norms as constants (the paper's section 4.3).
With `gains = m / ||V||` an adapted product is

    gains * (x W) + s (x A) (B * gains)

The frozen bias is not rescaled. Dropout d applies to the input of the pair only, as in LoRA. (peft
computes `x W + (gains - 1) * (d(x) W) + gains * s (d(x) A) B`, with a second frozen product;
without dropout both are equal.) The gradient of m needs the frozen product, which that of LoRA does
not.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.layers.frozen import adapter_leaf
from moe_jax.layers.kv_cache import read_cache, write_cache
from moe_jax.layers.names import DORA_NORMS
from moe_jax.layers.quantized import Kernel, dense_kernel


def column_norms(kernel: Kernel, lora_a: jax.Array, lora_b: jax.Array, scale: float) -> jax.Array:
    """Norms of the columns of `W + s A B`, for one pair or for each expert's; at least float32.

    No array of an adapted weight's size is materialized:

        ||W + s A B||^2 = ||W||^2 + 2 s sum_r (A' W) * B + s^2 sum_r ((A' A) B) * B

    The terms are a reduction of W, a thin product, and a term of rank size. For E pairs they take

        2 in out (E R + 1) + 2 E R^2 (in + out)

    operations besides those on [E, R, out]: the cost of the frozen product of E R + 1 tokens, once
    per forward pass, whatever the number of tokens. None of it is differentiated.

    W and A enter in the dtype that W is stored in; sums are float32. The relative error of a norm
    is 1e-6, and about 5e-7 c^2 for a column that the pair makes c times shorter, since the three
    terms cancel. Norms are bounded below by the rounding error of the terms, so that an adapted
    column is never much longer than its magnitude. Rounding A to bfloat16 changes norms by about
    1e-4. (Measured against float64 on 320 to 8192 rows, with s A B from 0.05 to 10 times as long as
    W.)

    Args:
      kernel: W, [in, out].
      lora_a: [in, R] or [in, E, R].
      lora_b: [R, out] or [E, R, out].
      scale: s.

    Returns:
      [out] or [E, out]; positive.
    """
    kernel, lora_a, lora_b = jax.lax.stop_gradient((dense_kernel(kernel), lora_a, lora_b))
    dtype, lora_a = _norm_dtype(kernel), lora_a.astype(kernel.dtype)

    def einsum(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(equation, left, right, precision="highest", preferred_element_type=dtype)

    cross = einsum("d...r,df->...rf", lora_a, kernel)
    gram = einsum("d...r,d...s->...rs", lora_a, lora_a)
    quadratic = scale**2 * jnp.sum(einsum("...rs,...sf->...rf", gram, lora_b) * lora_b, axis=-2)
    constant = jnp.broadcast_to(_squared_norms(kernel), quadratic.shape)
    square = constant + 2.0 * scale * jnp.sum(cross * lora_b, axis=-2) + quadratic
    info = jnp.finfo(dtype)
    rounding = info.eps * (constant + quadratic) + info.tiny  # of the sum's terms
    return jnp.sqrt(jnp.maximum(square, rounding))


def dora_gains(
    module: nn.Module,
    kernel: Kernel,
    lora_a: jax.Array,
    lora_b: jax.Array,
    scale: float,
    axes: tuple[str, ...],
) -> jax.Array:
    """The gains `m / ||W + s A B||`, float32, of one pair or of each expert; initially ones.

    Creates the leaf `magnitude` of `module`, initially the column norms of W. Decoding reads the
    gains that the prefill has computed.

    Args:
      module: module that owns the pairs.
      kernel: W, [in, out].
      lora_a: [in, R] or [in, E, R].
      lora_b: [R, out] or [E, R, out].
      scale: s.
      axes: logical axes of the result.

    Returns:
      [out] or [E, out].
    """
    known = read_cache(module, "gains")
    if known is not None:
        return known
    # Named so that rematerialization keeps them: they are small and slow to compute.
    norms = checkpoint_name(column_norms(kernel, lora_a, lora_b, scale), DORA_NORMS)

    def initial(*_: Any) -> jax.Array:
        # From W alone. `norms` is equal, but at initialization B is a constant of zeros, and XLA
        # for CPUs (jaxlib 0.10.2) fuses products with such constants into one that reads past their
        # end, so that columns may start as NaN.
        square = jnp.maximum(_squared_norms(dense_kernel(kernel)), jnp.finfo(norms.dtype).tiny)
        return jnp.broadcast_to(jnp.sqrt(square), norms.shape)

    gains = adapter_leaf(module, "magnitude", initial, norms.shape, axes) / norms
    write_cache(module, "gains", gains)
    return gains


def _squared_norms(kernel: jax.Array) -> jax.Array:
    """Squared norms [out] of the columns of W [in, out]; at least float32."""
    return jnp.sum(jnp.square(kernel.astype(_norm_dtype(kernel))), axis=0)


def _norm_dtype(kernel: jax.Array) -> Any:
    return jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32


def apply_gains(product: jax.Array, gains: jax.Array) -> jax.Array:
    """`gains * product` in the product's dtype; gains near one keep their digits in bfloat16.

    Args:
      product: [..., out].
      gains: [out].
    """
    excess = (gains - 1.0).astype(product.dtype)
    return product + product * jnp.broadcast_to(excess, product.shape)
