"""Low-rank pairs: their settings, and the products that every adapter method is made of.

An adapted projection is `x W' = (x W) + s (x A) B`, for one pair (LoRA) or for each of E experts on
the same frozen W. Experts differ from each other in rank-sized codes `x A_e` only, so it is these
that are dispatched, and not the tokens: shapes are static, there is no gather, scatter, sort or
dropped token. CONTRIBUTING.md has the algebra.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.adapters.lora.dora import apply_gains, dora_gains
from moe_jax.adapters.tree import adapter_leaf
from moe_jax.config.parse import require
from moe_jax.layers.quantized import Kernel
from moe_jax.layers.tokens import token_product
from moe_jax.sharding.axes import EXPERTS, RANK


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """What one low-rank pair is; of experts, each has one.

    Attributes:
      rank: R.
      alpha: a pair's product is scaled by alpha / rank.
      dropout: share of a pair's inputs that is dropped while training.
      init: distribution of A; B starts at zero. `kaiming` is uniform within 1 / sqrt(inputs), what
        peft and the LoRA authors use; `gaussian` is normal with standard deviation 1 / rank.
      rslora: scales by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732, eq. 4), so that the
        size of a step does not shrink as the rank grows.
      dora: trains the length of each column of the adapted weight apart from its direction (DoRA,
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
        """Initialiser of A for a projection of `fan_in` inputs."""
        if self.init == "gaussian":
            return nn.initializers.normal(1.0 / self.rank)
        bound = fan_in**-0.5
        return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@flax.struct.dataclass
class LoraA:
    """The A of E experts' pairs on one projection.

    Attributes:
      lora_a: [in, E, R]; the expert axis stands before the rank so that no transpose is needed.
      scale: s, see `LowRankConfig.scale`.
    """

    lora_a: jax.Array
    scale: float = flax.struct.field(pytree_node=False)

    def codes(self, x: jax.Array) -> jax.Array:
        """The scaled codes of every expert in one thin product: [..., in] to [..., E, R]."""
        width, experts, rank = self.lora_a.shape
        codes = token_product(x, self.lora_a.astype(x.dtype).reshape(width, experts * rank))
        return codes.reshape(*x.shape[:-1], experts, rank) * self.scale

    def of_each(self) -> "LoraA":
        """The experts one by one, each for itself, along a new first axis: [E, in, 1, R]."""
        return LoraA(jnp.moveaxis(self.lora_a, 1, 0)[:, :, None], self.scale)


@flax.struct.dataclass
class LoraB:
    """The B of E experts' pairs on one projection.

    Attributes:
      lora_b: [E, R, out]; with DoRA, times the gains.
      gains: [E, out], what DoRA multiplies each column of the adapted weight by; None without it.
    """

    lora_b: jax.Array
    gains: jax.Array | None

    def expand(self, codes: jax.Array) -> jax.Array:
        """Sum over experts of `codes_e B_e`, in one product: [..., E, R] to [..., out]."""
        experts, rank, features = self.lora_b.shape
        flat = codes.reshape(*codes.shape[:-2], experts * rank)
        return token_product(
            flat, self.lora_b.astype(codes.dtype).reshape(experts * rank, features)
        )

    def adapt(self, product: jax.Array, codes: jax.Array, combine: jax.Array | None) -> jax.Array:
        """The frozen product with the experts' changes, weighted.

        Args:
          product: x W, [..., out], without a bias.
          codes: [..., E, R].
          combine: [..., E], each expert's share; one-hot for a slot's expert. A token whose shares
            are all zero keeps the frozen product. None is for a single expert, who has all of it.
        """
        if combine is None:
            gains = self.gains
            adapted = product if gains is None else apply_gains(product, jnp.squeeze(gains, 0))
            return adapted + self.expand(codes)
        adapted = self.regain(product, combine)
        return adapted + self.expand(codes * combine.astype(codes.dtype)[..., None])

    def regain(self, product: jax.Array, combine: jax.Array) -> jax.Array:
        """The frozen product under DoRA's gains alone; the product itself without DoRA."""
        if self.gains is None:
            return product
        change = token_product(
            combine.astype(product.dtype), (self.gains - 1.0).astype(product.dtype)
        )
        return product + product * change

    def of_each(self) -> "LoraB":
        """The experts one by one, each for itself, along a new first axis: [E, 1, R, out]."""
        gains = None if self.gains is None else self.gains[:, None]
        return LoraB(self.lora_b[:, None], gains)


class Pairs(NamedTuple):
    """The low-rank pairs of E experts of one projection, ready to be applied."""

    a: LoraA
    b: LoraB


def joint_codes(x: jax.Array, pairs: Mapping[str, LoraA]) -> dict[str, jax.Array]:
    """The scaled codes [B, S, E, R] of several projections of the same input, in one product.

    Args:
      x: [B, S, in].
      pairs: by projection; of equal shapes and scales.
    """
    if not pairs:
        return {}
    first = next(iter(pairs.values()))
    stacked = jnp.concatenate([pair.lora_a for pair in pairs.values()], axis=-1)
    codes = LoraA(stacked, first.scale).codes(x)
    return dict(zip(pairs, jnp.split(codes, len(pairs), axis=-1), strict=True))


# FIXME docstring of the merged adapters.experts:
# """The trainable leaves of a projection's experts."""


class ExpertPairs(nn.Module):
    """The low-rank pairs of all experts of one projection.

    Attributes:
      low_rank: what each pair is.
      num_experts: E.
      axes: logical axes of the projection's kernel, (in, out).

    Leaves: `lora_A` [in, E, R], `lora_B` [E, R, out]; with DoRA `magnitude` [E, out].
    """

    low_rank: LowRankConfig
    num_experts: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, kernel: Kernel, present: jax.Array | None = None) -> Pairs:
        """The pairs on a frozen kernel [in, out].

        Args:
          kernel: the frozen kernel.
          present: bool [E], the experts that this layer has. The others start at zero, A too, and
            as no token reaches them they stay there. None stands for all.
        """
        config, (fan_in, features) = self.low_rank, kernel.shape
        experts, rank = self.num_experts, config.rank

        def init_a(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            drawn = config.init_a(fan_in)(key, shape, dtype)
            return drawn if present is None else drawn * present[:, None]

        axes_a, axes_b = (self.axes[0], EXPERTS, RANK), (EXPERTS, RANK, self.axes[1])
        lora_a = adapter_leaf(self, "lora_A", init_a, (fan_in, experts, rank), axes_a)
        zeros = nn.initializers.zeros
        lora_b = adapter_leaf(self, "lora_B", zeros, (experts, rank, features), axes_b)
        if not config.dora:
            return Pairs(LoraA(lora_a, config.scale), LoraB(lora_b, None))
        axes = (EXPERTS, self.axes[1])
        gains = dora_gains(self, kernel, lora_a, lora_b, config.scale, axes)
        return Pairs(LoraA(lora_a, config.scale), LoraB(lora_b * gains[:, None], gains))
