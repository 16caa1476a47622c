"""Tensors of a base with an adapter's pairs merged into them, computed one at a time.

A pair on a frozen matrix W gives `W + s A B`, and with DoRA that matrix times the gains,
`m / ||W + s A B||` for each column.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.lora.dora import column_norms
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.tree import MOE
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.model import FloatType, ModelConfig
from moe_jax.exchange.new_tokens import extended_table
from moe_jax.hf.base_model import BaseModel
from moe_jax.hf.key_table import Leaf, TensorParts, tensor_parts
from moe_jax.hf.load import checked_leaves, read_leaf
from moe_jax.hf.shards import Shards, open_shards

_FFN_KERNEL = re.compile(r"layers/mlp/(\w+_proj)/kernel")


class MergedWeights:
    """Matrices of a base, read from its files, with the pairs of an adapter merged into them.

    All results are float32, `[in, out]` as in leaves.
    """

    def __init__(self, shards: Shards, leaves: Sequence[Leaf], adapter: SavedAdapter):
        """See `open_merged_weights`."""
        self._shards = shards
        self._leaves = {"/".join(leaf.path): leaf for leaf in leaves}
        self._method: AdapterMethod = adapter.method
        self._adapter = {
            path: np.asarray(leaf) for path, leaf in named_leaves(adapter.tree).items()
        }

    def frozen(self, path: str, layer: int) -> np.ndarray:
        """A leaf of the base; of one layer if the leaf is stacked."""
        leaf = self._leaves[path]
        return read_leaf(leaf, self._shards, np.dtype(np.float32), layer if leaf.stacked else None)

    def merged(self, path: str, layer: int) -> np.ndarray:
        """A leaf of the base with the pair of its projection, or new tokens, if it has any."""
        site = path.removesuffix("/kernel")
        weight = extended_table(path, self.frozen(path, layer), self._method, self._adapter)
        if not path.endswith("/kernel") or f"{site}/lora_A" not in self._adapter:
            return weight
        return self._with_pair(weight, site, self._method.low_rank, (layer,), (layer,))

    def expert(self, target: str, layer: int, expert: int, low_rank: LowRankConfig) -> np.ndarray:
        """The matrix of one expert.

        Args:
          target: a projection of the FFN.
          layer: index of the layer.
          expert: index of the expert.
          low_rank: settings of the experts' pairs.
        """
        weight = self.frozen(f"layers/mlp/{target}/kernel", layer)
        site = f"layers/mlp/{MOE}/{target}"
        if f"{site}/lora_A" not in self._adapter:
            return weight
        return self._with_pair(
            weight, site, low_rank, (layer, slice(None), expert), (layer, expert)
        )

    def mean_expert(
        self, target: str, layer: int, shares: np.ndarray, low_rank: LowRankConfig
    ) -> np.ndarray:
        """The mean of the experts' matrices, weighted by `shares` [E]."""
        total = shares[0] * self.expert(target, layer, 0, low_rank)
        for expert in range(1, len(shares)):
            total += shares[expert] * self.expert(target, layer, expert, low_rank)
        return total

    def router(self, layer: int) -> np.ndarray:
        """The router kernel of a layer's FFN, [D, E]."""
        return self._adapter[f"layers/mlp/{MOE}/router/kernel"][layer]

    def _with_pair(
        self,
        weight: np.ndarray,
        site: str,
        low_rank: LowRankConfig,
        index_a: tuple[int | slice, ...],
        index_b: tuple[int, ...],
    ) -> np.ndarray:
        lora_a = self._adapter[f"{site}/lora_A"][index_a]
        lora_b = self._adapter[f"{site}/lora_B"][index_b]
        gains = None
        if low_rank.dora:
            kernel, a, b = (jnp.asarray(array) for array in (weight, lora_a, lora_b))
            norms = np.asarray(column_norms(kernel, a, b, low_rank.scale))
            gains = self._adapter[f"{site}/magnitude"][index_b] / norms
        weight += (np.float32(low_rank.scale) * lora_a) @ lora_b
        if gains is not None:
            weight *= gains
        return weight


@contextmanager
def open_merged_weights(base: BaseModel, adapter: SavedAdapter) -> Iterator[MergedWeights]:
    """Opens the files of a base.

    Args:
      base: from `moe_jax.loaded.adapter_base.open_adapter_base`.
      adapter: an adapter of that base.
    """
    with open_shards(base.folder) as shards:
        yield MergedWeights(shards, checked_leaves(shards, base.config), adapter)


class LazyTensor(NamedTuple):
    """A tensor of the checkpoint to be written, computed when its turn comes.

    Attributes:
      name: name in the checkpoint.
      shape: stored shape.
      compute: computes the tensor, of any float dtype and memory order.
    """

    name: str
    shape: tuple[int, ...]
    compute: Callable[[MergedWeights], np.ndarray]

    def num_bytes(self, dtype: FloatType) -> int:
        """Size of the tensor in a file."""
        return math.prod(self.shape) * jnp.dtype(dtype).itemsize


def base_tensors(model: ModelConfig) -> list[tuple[str, TensorParts]]:
    """Stored tensors of a base: those outside the layers, then layer by layer."""

    def layer(item: tuple[str, TensorParts]) -> int:
        leaf, index = item[1][0]
        return index if leaf.stacked else -1

    return sorted(tensor_parts(model).items(), key=layer)


def stored_shape(parts: TensorParts) -> tuple[int, ...]:
    """Stored shape of a base's tensor."""
    return parts[0][0].tensor_shape


def stored_tensor(parts: TensorParts, compute: Callable[[str, int], np.ndarray]) -> np.ndarray:
    """A base's tensor as it is stored, from its leaves.

    Args:
      parts: its entry in `tensor_parts`.
      compute: computes a leaf from its path and layer, as `MergedWeights.merged` does.
    """
    arrays = []
    for leaf, layer in parts:
        array = compute("/".join(leaf.path), layer)
        arrays.append(array.T if leaf.transposed else array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def merged_tensor(name: str, parts: TensorParts) -> LazyTensor:
    """A base's tensor with the pairs of its projections merged into it."""

    def compute(weights: MergedWeights) -> np.ndarray:
        return stored_tensor(parts, weights.merged)

    return LazyTensor(name, stored_shape(parts), compute)


def ffn_projection(path: str) -> str | None:
    """The FFN projection whose kernel is the base's leaf `path`; None for other leaves."""
    match = _FFN_KERNEL.fullmatch(path)
    return match[1] if match else None
