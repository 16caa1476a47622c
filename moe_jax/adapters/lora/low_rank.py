"""Low-rank pairs: their settings, the weights of E pairs on one projection, and their products.

An adapted projection is `x W' = x W + s (x A) B` (arXiv:2106.09685, eq. 3). The E experts of a
projection share the frozen product `x W` and differ in the low-rank activations `z_e = s x A_e`
only, [..., E, R]. Experts are therefore selected on these, and not on the tokens: all shapes are
static, and no token is gathered, sorted or dropped.

Letters of the einsums below, as in `moe_jax.adapters.mixlora`: d inputs, f outputs, e experts, r
rank.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.adapters.lora.dora import dora_gains
from moe_jax.config.parse import require
from moe_jax.layers.frozen import adapter_leaf
from moe_jax.layers.quantized import Kernel
from moe_jax.sharding.axes import EXPERTS, RANK


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """Settings of a low-rank pair; all experts of a method have the same.

    Attributes:
      rank: R.
      alpha: the pair's product is scaled by alpha / rank.
      dropout: share of the pair's input that is dropped during training.
      init: distribution of A; B starts at zero. `kaiming` is uniform within 1 / sqrt(inputs), as in
        peft and the LoRA authors' code; `gaussian` is normal with standard deviation 1 / rank.
      rslora: scales by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732, eq. 4), so that the
        update does not shrink as the rank grows.
      dora: trains the norm of each column of the adapted weight apart from its direction (DoRA,
        arXiv:2402.09353, eq. 5); see `moe_jax.adapters.lora.dora`.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        require(self.rank > 0, "rank", "must be positive")
        require(self.alpha > 0, "alpha", "must be positive")
        require(0.0 <= self.dropout < 1.0, "dropout", "must lie in [0, 1)")

    @property
    def scale(self) -> float:
        """s, the factor of the pair's product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def init_a(self, fan_in: int) -> nn.initializers.Initializer:
        """Initializer of A for a projection of `fan_in` inputs."""
        if self.init == "gaussian":
            return nn.initializers.normal(1.0 / self.rank)
        bound = fan_in**-0.5
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@flax.struct.dataclass
class ExpertPairs:
    """The low-rank pairs of E experts on one projection.

    Callers put all tokens along one axis: over two, [B, S], XLA computes the gradient of A or B
    from a transposed copy of the wider operand.

    Attributes:
      lora_a: A, [in, E, R]; the expert axis precedes the rank, so that the product with all experts
        needs no transpose.
      lora_b: B, [E, R, out]; with DoRA already multiplied by the gains.
      gains: [E, out], DoRA's factor of each column of the adapted weight; None without DoRA.
      scale: s, see `LowRankConfig.scale`.
    """

    lora_a: jax.Array
    lora_b: jax.Array
    gains: jax.Array | None
    scale: float = flax.struct.field(pytree_node=False)

    def activations(self, x: jax.Array) -> jax.Array:
        """The low-rank activations z = s x A of all experts: [..., in] to [..., E, R]."""
        return jnp.einsum("...d,der->...er", x, self.lora_a.astype(x.dtype)) * self.scale

    def expand(self, z: jax.Array) -> jax.Array:
        """`sum_e z_e B_e`: [..., E, R] to [..., out]."""
        return jnp.einsum("...er,erf->...f", z, self.lora_b.astype(z.dtype))

    def rescale(self, product: jax.Array, combine: jax.Array) -> jax.Array:
        """The frozen product [..., out] under DoRA's gains, mixed by `combine` [..., E].

        Gains near one keep their digits in bfloat16. Without DoRA it is the product itself.
        """
        if self.gains is None:
            return product
        gains = (self.gains - 1.0).astype(product.dtype)
        return product + product * jnp.einsum("...e,ef->...f", combine.astype(product.dtype), gains)

    def adapt(self, product: jax.Array, z: jax.Array, combine: jax.Array) -> jax.Array:
        """The frozen product plus the experts' deltas, weighted: `x W + sum_e combine_e z_e B_e`.

        Args:
          product: x W without its bias, [..., out].
          z: low-rank activations [..., E, R].
          combine: weight of each expert, [..., E]; one-hot for the expert of one slot. A token with
            all-zero weights keeps the frozen product.
        """
        selected = jnp.einsum("...er,...e->...er", z, combine.astype(z.dtype))
        return self.rescale(product, combine) + self.expand(selected)

    def experts_first(self) -> "ExpertPairs":
        """E pairs of one expert each, stacked along a new leading axis [E, ...]."""
        gains = None if self.gains is None else self.gains[:, None]
        lora_a = jnp.moveaxis(self.lora_a, 1, 0)[:, :, None]
        return ExpertPairs(lora_a, self.lora_b[:, None], gains, self.scale)


class ExpertLora(nn.Module):
    """Creates the low-rank pairs of all experts of one projection.

    Attributes:
      low_rank: settings of each pair.
      num_experts: E.
      axes: logical axes of the projection's kernel, (in, out).

    Leaves: `lora_A` [in, E, R], `lora_B` [E, R, out]; with DoRA `magnitude` [E, out].
    """

    low_rank: LowRankConfig
    num_experts: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, kernel: Kernel, present: jax.Array | None = None) -> ExpertPairs:
        """The pairs on a frozen kernel [in, out].

        Args:
          kernel: the frozen kernel.
          present: bool [E], the experts that this layer has; None if it has all. The others start
            at zero, A included, and stay there, since no token reaches them.
        """
        config, (fan_in, features) = self.low_rank, kernel.shape
        experts, rank = self.num_experts, config.rank

        def init_a(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            drawn = config.init_a(fan_in)(key, shape, dtype)
            return drawn if present is None else drawn * present[None, :, None].astype(dtype)

        axes_a, axes_b = (self.axes[0], EXPERTS, RANK), (EXPERTS, RANK, self.axes[1])
        lora_a = adapter_leaf(self, "lora_A", init_a, (fan_in, experts, rank), axes_a)
        zeros = nn.initializers.zeros
        lora_b = adapter_leaf(self, "lora_B", zeros, (experts, rank, features), axes_b)
        if not config.dora:
            return ExpertPairs(lora_a, lora_b, None, config.scale)
        axes = (EXPERTS, self.axes[1])
        gains = dora_gains(self, kernel, lora_a, lora_b, config.scale, axes)
        return ExpertPairs(lora_a, lora_b * gains[:, None], gains, config.scale)


def joint_activations(x: jax.Array, pairs: Mapping[str, ExpertPairs]) -> dict[str, jax.Array]:
    """The low-rank activations [..., E, R] of several projections of one input, in one product.

    Args:
      x: [..., in].
      pairs: by projection; equal shapes and scales.
    """
    if not pairs:
        return {}
    first = next(iter(pairs.values()))
    stacked = jnp.concatenate([pair.lora_a for pair in pairs.values()], axis=-1)
    z = dataclasses.replace(first, lora_a=stacked).activations(x)
    return dict(zip(pairs, jnp.split(z, len(pairs), axis=-1), strict=True))
