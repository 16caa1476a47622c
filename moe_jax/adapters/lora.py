"""LoRA: a low-rank delta beside a frozen projection (arXiv:2106.09685, eq. 3)."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod
from moe_jax.layers.collections import ADAPTERS
from moe_jax.sharding.axes import RANK


def lora_a_init(kind: str, fan_in: int, rank: int) -> nn.initializers.Initializer:
    """Initialiser of A; see `AdapterMethod.init`.

    Args:
      kind: `kaiming` is PyTorch's `kaiming_uniform_(a=sqrt(5))`, what peft and the LoRA authors
        use: uniform in +-1 / sqrt(fan_in). `gaussian` is peft's: standard deviation 1 / rank.
      fan_in: inputs of the projection.
      rank: R.
    """
    if kind == "gaussian":
        return nn.initializers.normal(1.0 / rank)
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def adapter_leaf(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> jax.Array:
    """A trainable float32 leaf of `module` in the `adapters` collection.

    Linen's `param` only knows the `params` collection, which here is frozen.
    """

    def make() -> Any:
        boxed = nn.with_logical_partitioning(init, axes)
        return boxed(module.make_rng(ADAPTERS), shape, jnp.float32)

    variable: Any = module.variable(ADAPTERS, name, make)
    return variable.value


class Lora(nn.Module):
    """Adds `scale * (x A) B` to a projection's frozen output.

    Attributes:
      method: the configuration.
      axes: logical axes of the projection's kernel, (in, out).

    Leaves: `lora_A` [in, R], `lora_B` [R, out].
    """

    method: AdapterMethod
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, *, deterministic: bool) -> jax.Array:
        rank, width = self.method.rank, x.shape[-1]
        init_a = lora_a_init(self.method.init, width, rank)
        lora_a = adapter_leaf(self, "lora_A", init_a, (width, rank), (self.axes[0], RANK))
        zeros = nn.initializers.zeros
        lora_b = adapter_leaf(self, "lora_B", zeros, (rank, y.shape[-1]), (RANK, self.axes[1]))
        x = nn.Dropout(self.method.dropout)(x, deterministic=deterministic)
        codes = jnp.dot(x, lora_a.astype(x.dtype)) * (self.method.alpha / rank)
        return y + jnp.dot(codes, lora_b.astype(x.dtype))


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterMethod):
    """Plain LoRA on any of the seven projections."""

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        return Lora(self, axes) if target in self.target_modules else None
