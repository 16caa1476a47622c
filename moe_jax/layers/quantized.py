"""Frozen kernels stored in eight or four bits, and their products.

A kernel W [in, out] is stored as narrow codes and scales. Each product decodes it, in the forward
pass and again in the backward pass; the decoded kernel is not kept in between. The kernel is
frozen, so that only the input has a gradient. LoRA on such a base is QLoRA (arXiv:2305.14314).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

BLOCK = 64
"""Number of consecutive inputs that share a scale in NF4 (arXiv:2305.14314, section 3)."""

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
"""Values of the sixteen codes, relative to a block's scale (arXiv:2305.14314, appendix E)."""

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
        """Shape of the kernel."""
        return self.codes.shape

    def dense(self, dtype: Any) -> jax.Array:
        """The decoded kernel."""
        return (self.codes.astype(jnp.float32) * self.scales[..., None, :]).astype(dtype)

    def product(self, x: jax.Array) -> jax.Array:
        """`x W`; the scales multiply the product, which is smaller than the kernel."""
        return self._scaled(jnp.dot(x, self.codes.astype(x.dtype)))

    def transposed_product(self, y: jax.Array) -> jax.Array:
        """`y W'`."""
        return jnp.dot(self._scaled(y), self.codes.astype(y.dtype).T)

    def _scaled(self, y: jax.Array) -> jax.Array:
        return y * jnp.broadcast_to(self.scales.astype(y.dtype), y.shape)


@flax.struct.dataclass
class DoubleScales:
    """Scales of blocks, quantized to eight bits between the smallest and largest of each output.

    Attributes:
      codes: uint8 [..., blocks, out].
      low: float32 [..., 1, out], value of code 0.
      step: float32 [..., 1, out], difference between consecutive codes.
    """

    codes: jax.Array
    low: jax.Array
    step: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def dense(self) -> jax.Array:
        """The decoded scales, float32 [..., blocks, out]."""
        return self.low + self.step * self.codes.astype(jnp.float32)


@flax.struct.dataclass
class Nf4Kernel:
    """NF4 codes of four bits, with one scale for each block of `BLOCK` inputs of an output.

    Attributes:
      codes: uint8 [..., in / 2, out]; input 2 i is in the low half of byte i, input 2 i + 1 in the
        high half.
      scales: bfloat16 [..., blocks, out], or `DoubleScales`; the last block may be shorter. Eight
        bits suffice: for normally distributed weights the codes have an error of 9%, and the
        rounded scales one of 0.1%.
    """

    codes: jax.Array
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        *stack, half, features = self.codes.shape
        return (*stack, 2 * half, features)

    def dense(self, dtype: Any) -> jax.Array:
        """The decoded kernel."""
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
    """Decoded scales of an `Nf4Kernel`, float32 [..., blocks, out]."""
    return scales.dense() if isinstance(scales, DoubleScales) else scales.astype(jnp.float32)


QuantizedKernel = ScaledKernel | Nf4Kernel
Kernel = jax.Array | QuantizedKernel


def quantize(kernel: jax.Array, kind: str) -> QuantizedKernel:
    """Quantizes a kernel, rounding to nearest.

    Args:
      kernel: float [in, out]; for `nf4` and `nf4_double` with an even number of inputs.
      kind: `int8` (symmetric, by output), `fp8` (e4m3, by output), `nf4`, or `nf4_double`, whose
        scales are quantized to eight bits.

    Raises:
      ValueError: the kind is unknown.
    """
    kernel = kernel.astype(jnp.float32)
    if kind in ("int8", "fp8"):
        largest = 127.0 if kind == "int8" else float(jnp.finfo(_FP8).max)
        # Any scale represents a column of zeros.
        extent = jnp.max(jnp.abs(kernel), axis=0)
        scales = jnp.where(extent > 0, extent / largest, 1.0)
        scaled = kernel / scales[None]
        codes = jnp.round(scaled).astype(jnp.int8) if kind == "int8" else scaled.astype(_FP8)
        return ScaledKernel(codes, scales)
    if kind not in ("nf4", "nf4_double"):
        raise ValueError(f"cannot quantize to {kind!r}")
    inputs, features = kernel.shape
    blocks = -(-inputs // BLOCK)
    padded = jnp.pad(kernel, ((0, blocks * BLOCK - inputs), (0, 0)))
    extent = jnp.max(jnp.abs(padded.reshape(blocks, BLOCK, features)), axis=1)
    double = kind == "nf4_double"
    scales = double_scales(extent) if double else extent.astype(jnp.bfloat16)
    used = block_scales(scales)
    divisor = jnp.repeat(jnp.where(used > 0, used, 1.0), BLOCK, axis=0)[:inputs]
    normalized = kernel / divisor
    levels = jnp.asarray(NF4_LEVELS, jnp.float32)
    codes = jnp.zeros(kernel.shape, jnp.uint8)
    for middle in (levels[:-1] + levels[1:]) / 2:
        codes += (normalized > middle).astype(jnp.uint8)
    return Nf4Kernel(codes[0::2] | (codes[1::2] << 4), scales)


def double_scales(scales: jax.Array) -> DoubleScales:
    """Quantizes scales [blocks, out] to eight bits, in equal steps over the range of each output.

    The paper (section 3) groups 256 scales; here a group is all scales of one output, so that
    sharding the outputs never splits a group.
    """
    low, high = jnp.min(scales, axis=0, keepdims=True), jnp.max(scales, axis=0, keepdims=True)
    step = (high - low) / 255.0
    codes = jnp.round((scales - low) / jnp.where(step > 0, step, 1.0)).astype(jnp.uint8)
    return DoubleScales(codes, low, step)


@jax.custom_vjp
def quantized_product(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    """`x W` [..., out] of x [..., in], in the dtype of x; differentiable in x only."""
    return kernel.product(x)


def _forward(x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    return kernel.product(x), kernel


def _backward(kernel: QuantizedKernel, cotangent: jax.Array) -> tuple[jax.Array, None]:
    return kernel.transposed_product(cotangent), None


quantized_product.defvjp(_forward, _backward)


def dense_kernel(kernel: Kernel) -> jax.Array:
    """The kernel [..., in, out] as an array: as stored, or in float32 if it is quantized."""
    return kernel.dense(jnp.float32) if isinstance(kernel, QuantizedKernel) else kernel
