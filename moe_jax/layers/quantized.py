"""Frozen kernels stored in eight or four bits, and their products.

A kernel W [in, out] is kept as small codes and as scales. It is made again inside each product, in
the forward pass and once more in the backward pass, and is never kept between the two; gradients
reach the input only, as the kernel is frozen. Adapters on such a base are QLoRA
(arXiv:2305.14314) and its mixtures.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

BLOCK = 64
"""Consecutive inputs of one output that share a scale in NF4 (arXiv:2305.14314, section 3)."""

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the sixteen codes, in parts of a block's scale (arXiv:2305.14314, appendix E)."""

_FP8 = jnp.float8_e4m3fn


@flax.struct.dataclass
class ScaledKernel:
    """int8 or fp8 (e4m3) codes with one scale for each output.

    Attributes:
      codes: int8 or float8_e4m3fn [..., in, out].
      scales: float32 [..., out].
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return self.codes.shape

    def dense(self, dtype: Any) -> jax.Array:
        """The kernel that is stood for."""
        return (self.codes.astype(jnp.float32) * self.scales[..., None, :]).astype(dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """`x W`; the scales come after the product, on fewer numbers."""
        return jnp.dot(x, self.codes.astype(x.dtype)) * self.scales.astype(x.dtype)

    def transposed_product(self, y: jax.Array) -> jax.Array:
        """`y W'`."""
        return jnp.dot(y * self.scales.astype(y.dtype), self.codes.astype(y.dtype).T)


@flax.struct.dataclass
class DoubleScales:
    """The scales of blocks, themselves in eight bits between each output's least and largest.

    Attributes:
      codes: uint8 [..., blocks, out].
      low, step: float32 [..., 1, out]; the value of code 0, and from one code to the next.
    """

    codes: jax.Array
    low: jax.Array
    step: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dense(self) -> jax.Array:
        """float32 [..., blocks, out]."""
        return self.low + self.step * self.codes.astype(jnp.float32)


@flax.struct.dataclass
class Nf4Kernel:
    """Four bits a weight, with one scale for each block of `BLOCK` inputs of an output.

    Attributes:
      codes: uint8 [..., in / 2, out]; input 2 i in the low half of byte i, input 2 i + 1 above it.
      scales: bfloat16 [..., blocks, out], or `DoubleScales`; the last block may be shorter. Eight
        bits of a scale are plenty beside the four of what it scales: of normal weights, the codes
        err by 9%, and a rounded scale by 0.1%.
    """

    codes: jax.Array
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        *stack, half, features = self.codes.shape
        return (*stack, 2 * half, features)

    def dense(self, dtype: Any) -> jax.Array:
        """The kernel that is stood for."""
        *stack, inputs, features = self.shape
        levels = jnp.asarray(NF4_LEVELS, jnp.float32)
        halves = jnp.stack([self.codes & 15, self.codes >> 4], axis=-2)  # [..., in/2, 2, out]
        values = levels[halves.reshape(*stack, inputs, features)]
        spread = jnp.repeat(block_scales(self.scales), BLOCK, axis=-2)[..., :inputs, :]
        return (values * spread).astype(dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """`x W`."""
        return jnp.dot(x, self.dense(x.dtype))

    def transposed_product(self, y: jax.Array) -> jax.Array:
        """`y W'`."""
        return jnp.dot(y, self.dense(y.dtype).T)


def block_scales(scales: jax.Array | DoubleScales) -> jax.Array:
    """The scales of an `Nf4Kernel`, float32 [..., blocks, out]."""
    return scales.dense() if isinstance(scales, DoubleScales) else scales.astype(jnp.float32)


QuantizedKernel = ScaledKernel | Nf4Kernel
Kernel = jax.Array | QuantizedKernel


def quantize(kernel: jax.Array, kind: str) -> QuantizedKernel:
    """The nearest kernel that can be stored.

    Args:
      kernel: float [in, out]; of `nf4`, an even number of inputs.
      kind: `int8` (symmetric, by output), `fp8` (e4m3, by output), `nf4`, or `nf4_double`, whose
        scales are stored in eight bits too.

    Raises:
      ValueError: there is no such kind.
    """
    kernel = kernel.astype(jnp.float32)
    if kind in ("int8", "fp8"):
        largest = 127.0 if kind == "int8" else float(jnp.finfo(_FP8).max)
        # A column of zeros has any scale.
        extent = jnp.max(jnp.abs(kernel), axis=0)
        scales = jnp.where(extent > 0, extent / largest, 1.0)
        scaled = kernel / scales
        codes = jnp.round(scaled).astype(jnp.int8) if kind == "int8" else scaled.astype(_FP8)
        return ScaledKernel(codes, scales)
    if kind not in ("nf4", "nf4_double"):
        raise ValueError(f"cannot quantise to {kind!r}")
    inputs, features = kernel.shape
    blocks = -(-inputs // BLOCK)
    padded = jnp.pad(kernel, ((0, blocks * BLOCK - inputs), (0, 0)))
    extent = jnp.max(jnp.abs(padded.reshape(blocks, BLOCK, features)), axis=1)
    double = kind == "nf4_double"
    scales = double_scales(extent) if double else extent.astype(jnp.bfloat16)
    used = block_scales(scales)
    divisor = jnp.repeat(jnp.where(used > 0, used, 1.0), BLOCK, axis=0)[:inputs]
    normalised = kernel / divisor
    levels = jnp.asarray(NF4_LEVELS, jnp.float32)
    codes = jnp.zeros(kernel.shape, jnp.uint8)
    for middle in (levels[:-1] + levels[1:]) / 2:
        codes += (normalised > middle).astype(jnp.uint8)
    return Nf4Kernel(codes[0::2] | (codes[1::2] << 4), scales)


def double_scales(scales: jax.Array) -> DoubleScales:
    """Scales [blocks, out] in eight bits, in equal steps between those of each output.

    The paper's section 3 takes groups of 256 scales and their mean; ours are the scales of one
    output, as many as its inputs have blocks, so that nothing is split between devices.
    """
    low, high = jnp.min(scales, axis=0, keepdims=True), jnp.max(scales, axis=0, keepdims=True)
    step = (high - low) / 255.0
    codes = jnp.round((scales - low) / jnp.where(step > 0, step, 1.0)).astype(jnp.uint8)
    return DoubleScales(codes, low, step)


@jax.custom_vjp
def quantized_product(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    """`x W` [..., out] of x [..., in], in the type of x; differentiable in x alone."""
    return kernel.product(x)


def _forward(x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    return kernel.product(x), kernel


def _backward(kernel: QuantizedKernel, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return kernel.transposed_product(cotangent), None


quantized_product.defvjp(_forward, _backward)


def frozen_product(x: jax.Array, kernel: Kernel) -> jax.Array:
    """`x W` in the type of x, however W [in, out] is stored."""
    if isinstance(kernel, QuantizedKernel):
        return quantized_product(x, kernel)
    return jnp.dot(x, kernel.astype(x.dtype))


def dense_kernel(kernel: Kernel) -> jax.Array:
    """W [..., in, out] as an array: as it is stored, or in float32 where it is quantised."""
    return kernel.dense(jnp.float32) if isinstance(kernel, QuantizedKernel) else kernel
