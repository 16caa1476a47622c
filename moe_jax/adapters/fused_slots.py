"""The expert slots of MixLoRA as GPU kernels that keep each slot's activations in registers.

`moe_jax.adapters.expert_slots` writes and reads [T, F] arrays for the deltas, the activation and
the gradients of every slot. Here a kernel computes a tile of gate_c, up_c and h_c of all slots from
the frozen products, and writes the sum of the h_c alone. The backward pass computes the tile again:

    forward             reads gate, up; writes the sum, and z_down = h_c A_down of each slot
    backward, tokens    reads gate, up and the sum's gradient; writes the gradients of gate and up,
                        and those of the codes and weights
    backward, experts   reads the three again, once for each slot; writes the gradients of the pairs

The codes of a slot are the low-rank activations of its expert alone, R numbers. The kernels over
tokens take these sorted by their experts, so that a tile multiplies its codes with the pairs of one
or two experts and not of all; the order changes no result. The kernel over experts takes the slots
sorted by expert. Every sum has a fixed order, without atomic additions.

Products take operands in the dtype of the frozen products and add in float32; nothing else is
rounded. The kernels are Pallas programs, which Triton compiles. On a CPU Pallas interprets them,
for tests.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.adapters.expert_slots import SlotInputs
from moe_jax.adapters.fused_slot_arrays import (
    TOKENS,
    Arrays,
    Orders,
    Settings,
    dropout_arrays,
    sorted_slots,
)
from moe_jax.adapters.fused_slot_kernels import (
    FEATURES,
    experts_kernel,
    forward_kernel,
    tokens_kernel,
)
from moe_jax.adapters.lora.low_rank import ExpertPairs
from moe_jax.errors import ConfigError
from moe_jax.layers.activation import ACTIVATIONS
from moe_jax.layers.names import LOW_RANK, WIDE_PRODUCT

_NARROWEST = 16
"""Smallest rank that tensor cores multiply; codes and pairs are padded with zeros to it."""

_PROGRAMS = 512
"""Programs of a kernel over tokens at least, some four for each multiprocessor of a large GPU. With
few tokens, several programs share the features of a tile, and their sums over F are added later."""


def require_fusible(
    inputs: SlotInputs,
    pairs: Mapping[str, ExpertPairs],
    dispatch: jax.Array | None,
    *,
    drops_hidden: bool,
) -> None:
    """Checks that the kernels can compute these experts.

    Args:
      inputs, pairs, dispatch: as for `fused_expert_slots`.
      drops_hidden: True if training drops hidden activations.

    Raises:
      ConfigError: they cannot.
    """
    limits = {
        "needs gate_proj, up_proj and down_proj among method.target_modules": len(pairs) < 3,
        "needs a router that chooses single experts, 'top_k' or 'switch'": dispatch is None,
        "cannot compute DoRA": any(pair.gains is not None for pair in pairs.values()),
        "cannot drop hidden activations (method.ffn_dropout)": drops_hidden,
        "cannot index 2^31 hidden activations: raise training.micro_batches": (
            inputs.gate.size >= 2**31
        ),
        "cannot add the biases of this model's FFN": inputs.gate_bias is not None,
        "cannot compute this model's hidden_act 'gelu'": inputs.activation is ACTIVATIONS["gelu"],
    }
    for limit, applies in limits.items():
        if applies:
            raise ConfigError(f"config.compute.experts: 'fused' {limit}; or use 'einsum'")


def fused_expert_slots(
    inputs: SlotInputs,
    pairs: Mapping[str, ExpertPairs],
    z: Mapping[str, jax.Array],
    dispatch: jax.Array | None,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`expert_slots` in fused kernels; see there for arguments and results.

    The caller checks them with `require_fusible`.
    """
    assert dispatch is not None
    (tokens, slots, experts), (_, features) = dispatch.shape, inputs.gate.shape
    dtype, dispatch = inputs.gate.dtype, jax.lax.stop_gradient(dispatch)
    rank = pairs["gate_proj"].lora_b.shape[1]
    padded_rank = max(_NARROWEST, pl.next_power_of_2(rank))

    def padded(array: jax.Array, axis: int) -> jax.Array:
        widths = [(0, padded_rank - rank if i == axis else 0) for i in range(array.ndim)]
        return jnp.pad(array.astype(dtype), widths)

    def codes(target: str) -> jax.Array:
        chosen = jnp.einsum("ter,tce->tcr", z[target], dispatch.astype(dtype))
        return padded(chosen, 2).reshape(tokens, -1)

    gate, up = checkpoint_name((inputs.gate, inputs.up), WIDE_PRODUCT)
    arrays = Arrays(
        gate=gate,
        up=up,
        z_gate=codes("gate_proj"),
        z_up=codes("up_proj"),
        b_gate=padded(pairs["gate_proj"].lora_b, 1).reshape(-1, features),
        b_up=padded(pairs["up_proj"].lora_b, 1).reshape(-1, features),
        a_down=padded(pairs["down_proj"].lora_a, 2).reshape(features, -1),
        weights=weights.astype(jnp.float32),
    )
    blocks = pl.cdiv(features, FEATURES)
    sharing = min(blocks, pl.cdiv(_PROGRAMS, pl.cdiv(tokens, TOKENS)))
    settings = Settings(
        inputs.activation,
        slots,
        experts,
        padded_rank,
        blocks=pl.cdiv(blocks, sharing),
        drops=keys is not None and inputs.down_dropout is not None,
    )
    ordered: Any = checkpoint_name(sorted_slots(dispatch), LOW_RANK)
    drop = dropout_arrays(inputs.down_dropout, keys, (tokens, slots, features))
    orders = Orders(*ordered, *drop)
    results: Any = _slots(settings, arrays, orders)
    total, z_down = results
    z_down = z_down.reshape(tokens, slots, padded_rank)[..., :rank] * pairs["down_proj"].scale
    return total, jnp.einsum("tcr,tce->ter", z_down.astype(dtype), dispatch.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slots(settings: Settings, arrays: Arrays, orders: Orders) -> tuple[jax.Array, jax.Array]:
    """Sum of the slots [T, F], and their float32 codes on the down projection [T, C R]."""
    grid = _grid(settings, arrays, orders)
    total, z_down = _launch(
        functools.partial(forward_kernel, settings),
        "expert_slots",
        grid,
        [_like(arrays.gate), _partial_sums(grid, arrays.z_gate)],
        [*arrays, *orders],
        _Work(_flops(settings, arrays, 3), again=0),
    )
    return total, jnp.sum(z_down, axis=0)


def _slots_forward(settings: Settings, arrays: Arrays, orders: Orders) -> Any:
    return _slots(settings, arrays, orders), (arrays, orders)


def _slots_backward(
    settings: Settings, residuals: tuple[Arrays, Orders], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Arrays, None]:
    arrays, orders = residuals
    dtype = arrays.gate.dtype
    inputs = [*arrays, *orders, cotangents[0], cotangents[1].astype(dtype)]
    grid = _grid(settings, arrays, orders)
    narrow = (arrays.z_gate, arrays.z_up, arrays.weights)
    d_gate, d_up, *partial_sums = _launch(
        functools.partial(tokens_kernel, settings),
        "expert_slots_backward_tokens",
        grid,
        [_like(arrays.gate), _like(arrays.up), *(_partial_sums(grid, x) for x in narrow)],
        inputs,
        _Work(_flops(settings, arrays, 5), again=0),
    )
    d_z_gate, d_z_up, d_weights = (
        jnp.sum(d, axis=0).astype(x.dtype) for d, x in zip(partial_sums, narrow, strict=True)
    )
    d_b_gate, d_b_up, d_a_down = _launch(
        functools.partial(experts_kernel, settings),
        "expert_slots_backward_experts",
        (pl.cdiv(arrays.gate.shape[1], FEATURES), settings.experts),
        [jax.ShapeDtypeStruct(arrays.a_down.shape, jnp.float32)] * 3,
        inputs,
        _Work(_flops(settings, arrays, 6), again=3 * (settings.slots - 1)),
    )
    d_b_gate, d_b_up = (d.astype(dtype).T for d in (d_b_gate, d_b_up))
    gradients = Arrays(
        d_gate, d_up, d_z_gate, d_z_up, d_b_gate, d_b_up, d_a_down.astype(dtype), d_weights
    )
    return gradients, None


_slots.defvjp(_slots_forward, _slots_backward)


def _grid(settings: Settings, arrays: Arrays, orders: Orders) -> tuple[int, int]:
    """Tiles of tokens, and programs of each."""
    blocks = pl.cdiv(arrays.gate.shape[1], FEATURES)
    return len(orders.tokens) // TOKENS, pl.cdiv(blocks, settings.blocks)


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _partial_sums(grid: tuple[int, int], array: jax.Array) -> jax.ShapeDtypeStruct:
    """One float32 array for each program of a tile."""
    return jax.ShapeDtypeStruct((grid[1], *array.shape), jnp.float32)


def _flops(settings: Settings, arrays: Arrays, products: int) -> int:
    """FLOPs of this number of products [T, R] x [R, F] for each slot."""
    return 2 * products * settings.slots * settings.rank * arrays.gate.size


class _Work(NamedTuple):
    """FLOPs and repeated reads of a kernel, for estimates of its time.

    Attributes:
      flops: FLOPs, if all slots of a tile have the same expert.
      again: [T, F] arrays that it reads beside its operands, as it reads them more than once.
    """

    flops: int
    again: int


def _launch(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, int],
    results: Any,
    operands: Any,
    work: _Work,
) -> Any:
    """Runs a kernel on an NVIDIA GPU, and interprets it elsewhere.

    Its metadata states FLOPs and bytes, which `moe_jax.compiled.roofline` cannot see.
    """
    gate = operands[0]
    moved = sum(array.size * array.dtype.itemsize for array in (*operands, *results))
    moved += work.again * gate.size * gate.dtype.itemsize

    def run(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=results,
            name=name,
            interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
            metadata={"flops": str(work.flops), "bytes": str(moved)},
        )

    return jax.lax.platform_dependent(*operands, cuda=run(False), default=run(True))
