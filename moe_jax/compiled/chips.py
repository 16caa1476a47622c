"""Known chips: their peak rates, the rates that large kernels reach, and their memory.

Peaks are those of the data sheets, for dense products: NVIDIA's of the A100 80GB, H100 and H200
(SXM), and Google's of TPU v5p and v6e. The rates that kernels reach are about 80% of the peak of
products and 90% of that of the memory, as is usual for large kernels; those of attention are
assumptions. Pure Python, without jax.
"""

from dataclasses import dataclass

from moe_jax.config.parse import suggest
from moe_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates that large kernels reach on a chip.

    Attributes:
      product: FLOP/s of a large matrix product in half precision.
      attention: FLOP/s of fused attention, forward.
      attention_backward: FLOP/s of fused attention, backward.
      memory: bytes/s to and from memory.
      link: bytes/s to other chips of a host, in one direction.
      launch: seconds between two kernels.
    """

    product: float
    attention: float
    attention_backward: float
    memory: float
    link: float
    launch: float


@dataclass(frozen=True, kw_only=True)
class GpuLimits:
    """Properties of a GPU that XLA needs to compile for it, besides those common to all.

    Attributes:
      capability: CUDA's compute capability.
      accelerated: True if the architecture has features of its own, such as `sm_90a`.
      cores: number of multiprocessors.
      clock_ghz: highest clock rate.
      l2_bytes: size of the L2 cache.
      shared_bytes: shared memory of a multiprocessor; a block can have 1 KiB less.
    """

    capability: tuple[int, int]
    accelerated: bool
    cores: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of accelerator.

    Attributes:
      platform: JAX's name of its platform, `gpu` or `tpu`.
      kinds: values of `Device.device_kind` of such chips.
      memory_bytes: size of its memory.
      peak_half: peak FLOP/s of products in bfloat16 and float16.
      peak_single: peak FLOP/s of float32 products as JAX computes them by default: with inputs
        rounded to TF32 on these GPUs, and to bfloat16 on TPUs.
      peak_memory: peak bytes/s of the memory.
      rates: rates that large kernels reach in half precision.
      gpu: limits of a GPU; None for a TPU.
    """

    platform: str
    kinds: tuple[str, ...]
    memory_bytes: int
    peak_half: float
    peak_single: float
    peak_memory: float
    rates: Rates
    gpu: GpuLimits | None = None

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of products in `dtype`."""
        return self.peak_single if dtype == "float32" else self.peak_half

    def rates_of(self, dtype: str) -> Rates:
        """Rates that kernels reach in `dtype`."""
        rates, slower = self.rates, self.peak(dtype) / self.peak_half
        return Rates(
            product=rates.product * slower,
            attention=rates.attention * slower,
            attention_backward=rates.attention_backward * slower,
            memory=rates.memory,
            link=rates.link,
            launch=rates.launch,
        )


_HOPPER = GpuLimits(
    capability=(9, 0),
    accelerated=True,
    cores=132,
    clock_ghz=1.98,
    l2_bytes=50 * 2**20,
    shared_bytes=228 * 2**10,
)

CHIPS = {
    "h200": Chip(
        platform="gpu",
        kinds=("NVIDIA H200",),
        memory_bytes=141 * 2**30,
        peak_half=989e12,
        peak_single=494e12,
        peak_memory=4.8e12,
        rates=Rates(
            product=790e12,
            attention=500e12,
            attention_backward=400e12,
            memory=4.3e12,
            link=450e9,
            launch=2e-6,
        ),
        gpu=_HOPPER,
    ),
    "h100": Chip(
        platform="gpu",
        kinds=("NVIDIA H100 80GB HBM3",),
        memory_bytes=80 * 2**30,
        peak_half=989e12,
        peak_single=494e12,
        peak_memory=3.35e12,
        rates=Rates(
            product=790e12,
            attention=500e12,
            attention_backward=400e12,
            memory=3.0e12,
            link=450e9,
            launch=2e-6,
        ),
        gpu=_HOPPER,
    ),
    "a100": Chip(
        platform="gpu",
        kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"),
        memory_bytes=80 * 2**30,
        peak_half=312e12,
        peak_single=156e12,
        peak_memory=2.04e12,
        rates=Rates(
            product=250e12,
            attention=180e12,
            attention_backward=140e12,
            memory=1.8e12,
            link=300e9,
            launch=2e-6,
        ),
        gpu=GpuLimits(
            capability=(8, 0),
            accelerated=False,
            cores=108,
            clock_ghz=1.41,
            l2_bytes=40 * 2**20,
            shared_bytes=164 * 2**10,
        ),
    ),
    "v5p": Chip(
        platform="tpu",
        kinds=("TPU v5p", "TPU v5"),
        memory_bytes=95 * 2**30,
        peak_half=459e12,
        peak_single=459e12,
        peak_memory=2.76e12,
        rates=Rates(
            product=370e12,
            attention=250e12,
            attention_backward=200e12,
            memory=2.5e12,
            link=600e9,
            launch=0.0,
        ),
    ),
    "v6e": Chip(
        platform="tpu",
        kinds=("TPU v6e", "TPU v6 lite"),
        memory_bytes=32 * 2**30,
        peak_half=918e12,
        peak_single=918e12,
        peak_memory=1.64e12,
        rates=Rates(
            product=730e12,
            attention=500e12,
            attention_backward=400e12,
            memory=1.47e12,
            link=400e9,
            launch=0.0,
        ),
    ),
}
"""Chips by the name that `--compile-for` takes."""


def chip_named(name: str) -> Chip:
    """The chip called `name`.

    Raises:
      ConfigError: no chip has this name.
    """
    if name not in CHIPS:
        raise ConfigError(f"--compile-for: no chip is called {name!r}; {suggest(name, CHIPS)}")
    return CHIPS[name]


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip whose devices have this `Device.device_kind`; None if it is unknown."""
    found = (chip for chip in CHIPS.values() if device_kind in chip.kinds)
    return next(found, None)
