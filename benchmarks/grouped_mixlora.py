"""MixLoRA with tokens sorted by expert, an alternative to the package's one-hot form.

Computes the same results from the same leaves as `moe_jax.adapters.mixlora`. A block of rows of one
expert is multiplied with that expert's pairs only, in all three projections. Needs jax and flax
only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.grouped_rows import Walk, compute_blocks, group_rows, rows_of_block
from moe_jax.adapters.lora.low_rank import ExpertLora
from moe_jax.adapters.method import AdapterContext, AdapterMethod, FFNUpdate, FrozenFFN
from moe_jax.adapters.mixlora import MixLoraConfig, MixLoraFFN
from moe_jax.adapters.tree import MLP_MODULES
from moe_jax.config.parse import require
from moe_jax.layers.activation import gated
from moe_jax.sharding.axes import EMBED, MLP


@dataclass(frozen=True, kw_only=True)
class GroupedMixLora(MixLoraConfig):
    """Configuration of MixLoRA in blocks of one expert; not registered in `METHODS`.

    Attributes:
      walk: order of the blocks, see `Walk`.
      block: number of rows of a block; None for `rows_of_block`.
    """

    walk: Walk = "loop"
    block: int | None = None

    def __post_init__(self):
        super().__post_init__()
        has_all = set(MLP_MODULES) <= set(self.target_modules)
        require(has_all, "target_modules", f"must have {', '.join(MLP_MODULES)}")
        pair = self.expert_low_rank
        unsupported = {"dora": pair.dora, "dropout": pair.dropout, "ffn_dropout": self.ffn_dropout}
        for field, value in unsupported.items():
            require(not value, field, "not supported by the grouped form; leave it out")

    @property
    def is_additive(self) -> bool:
        return False  # the gradients of a block read its rows of the frozen products

    def mlp_adapter(self) -> nn.Module | None:
        return GroupedMLP(self)


def group_mixlora(
    method: AdapterMethod, walk: Walk = "loop", block: int | None = None
) -> GroupedMixLora:
    """Returns the same MixLoRA in the grouped form."""
    assert isinstance(method, MixLoraConfig)
    return GroupedMixLora(**vars(method), walk=walk, block=block)


class BlockResult(NamedTuple):
    """Weighted results of a block of n rows.

    Attributes:
      hidden: hidden activations of the expert, [n, F].
      delta: low-rank update of the down projection, [n, D].
    """

    hidden: jax.Array
    delta: jax.Array


class Expert(NamedTuple):
    """Computation of a block, a `Body` of `grouped_rows.py`; hashable, for the jit cache.

    Attributes:
      activation: activation function of the gate.
      scale: scaling factor s.
    """

    activation: Callable[[jax.Array], jax.Array]
    scale: float

    def __call__(self, tokens: Any, rows: Any, pairs: dict[str, Any]) -> BlockResult:
        (x, gate, up), (weights, served) = tokens, (row[:, None] for row in rows)

        def update(target: str, x: jax.Array) -> jax.Array:
            lora_a, lora_b = (leaf.astype(x.dtype) for leaf in pairs[target])
            return (jnp.dot(x, lora_a) * (served * self.scale)) @ lora_b

        gate, up = gate + update("gate_proj", x), up + update("up_proj", x)
        hidden = weights * gated(self.activation, gate, up)
        return BlockResult(hidden, update("down_proj", hidden))


class GroupedMLP(MixLoraFFN):
    """Routed FFN of a `GroupedMixLora`, block by block, with the leaves of `MixLoraFFN`."""

    @nn.compact
    def __call__(
        self, x: jax.Array, ffn: FrozenFFN, context: AdapterContext, *, deterministic: bool
    ) -> FFNUpdate:
        """See `AdapterMethod.mlp_adapter`.

        Raises:
          ValueError: the base has biases, or the router does not choose experts.
        """
        method, routing = self.method, self._route(x, context, deterministic)
        assert isinstance(method, GroupedMixLora)
        biases = (ffn.gate_bias, ffn.up_bias, ffn.down_bias, routing.bypass)
        if routing.dispatch is None or any(bias is not None for bias in biases):
            raise ValueError("needs a router that chooses experts, and a base without biases")
        experts, slots = method.num_experts, routing.weights.shape[-1]
        kernels = {
            "gate_proj": (ffn.gate.kernel, (EMBED, MLP)),
            "up_proj": (ffn.up.kernel, (EMBED, MLP)),
            "down_proj": (ffn.down_kernel, (MLP, EMBED)),
        }
        pairs = {}
        for target, (kernel, axes) in kernels.items():
            pair = ExpertLora(method.expert_low_rank, experts, axes, name=target)(kernel)
            pairs[target] = (jnp.moveaxis(pair.lora_a, 1, 0), pair.lora_b)

        by_slot = lambda array: array.reshape(-1, slots)
        chosen = by_slot(jnp.argmax(routing.dispatch, axis=-1))
        # A slot without an expert is the frozen FFN: its low-rank activations are set to zero.
        served = by_slot(jnp.sum(routing.dispatch, axis=-1))
        rows = [array.T.astype(x.dtype) for array in (by_slot(routing.weights), served)]
        block = method.block or rows_of_block(chosen.size, experts)
        by_token = lambda array: array.reshape(-1, array.shape[-1])
        tokens = [by_token(array) for array in (x, ffn.gate.product, ffn.up.product)]
        body = Expert(ffn.activation, method.expert_low_rank.scale)
        operands = tokens, rows, pairs, group_rows(chosen, experts, block)
        results = compute_blocks(body, method.walk, True, *operands)
        return FFNUpdate(*(array.reshape(*x.shape[:2], -1) for array in results))
