"""The weights of a base with an adapter's pairs in them, one matrix at a time.

A pair on a frozen matrix W is one matrix again: `W + s A B`, and with DoRA that times the gains,
`m / ||W + s A B||` for each column. Where experts share W, each has such a matrix.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.lora.dora import column_norms
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.tree import MOE
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.hf.key_table import Leaf
from moe_jax.hf.load import checked_leaves, read_leaf
from moe_jax.hf.shards import Shards, open_shards
from moe_jax.loaded.base_folder import BaseFolder

_EXPERT = re.compile(r"layers/mlp/(\w+_proj)/kernel")


def expert_target(path: str) -> str | None:
    """The FFN projection whose kernel the base's leaf `path` is, or None if it is another leaf."""
    match = _EXPERT.fullmatch(path)
    return match[1] if match else None


class Merger:
    """Reads matrices of the base from its files, and puts an adapter's pairs into them.

    All results are float32 and as leaves are, `[in, out]`.
    """

    def __init__(self, shards: Shards, leaves: Sequence[Leaf], adapter: SavedAdapter):
        """See `open_merger`."""
        self._shards = shards
        self._leaves = {"/".join(leaf.path): leaf for leaf in leaves}
        self._method: AdapterMethod = adapter.method
        self._adapter = {
            path: np.asarray(leaf) for path, leaf in named_leaves(adapter.tree).items()
        }

    def frozen(self, path: str, layer: int) -> np.ndarray:
        """A leaf of the base, of one layer where it is stacked."""
        leaf = self._leaves[path]
        return read_leaf(leaf, self._shards, np.dtype(np.float32), layer if leaf.stacked else None)

    def merged(self, path: str, layer: int) -> np.ndarray:
        """The same with the pair that this projection has, if it has one."""
        site = path.removesuffix("/kernel")
        weight = self.frozen(path, layer)
        if not path.endswith("/kernel") or f"{site}/lora_A" not in self._adapter:
            return weight
        return self._with_pair(weight, site, self._method.low_rank, (layer,), (layer,))

    def expert(self, target: str, layer: int, expert: int, low_rank: LowRankConfig) -> np.ndarray:
        """The matrix of one expert of a layer.

        Args:
          target: a projection of the FFN.
          layer: from 0.
          expert: from 0.
          low_rank: the experts' pairs.
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
        """The mean of the experts' matrices, each expert weighted by its share of [E]."""
        total = shares[0] * self.expert(target, layer, 0, low_rank)
        for expert in range(1, len(shares)):
            total += shares[expert] * self.expert(target, layer, expert, low_rank)
        return total

    def router(self, layer: int) -> np.ndarray:
        """The kernel of the router that all experts of a layer share, [D, E]."""
        return self._adapter[f"layers/mlp/{MOE}/router/kernel"][layer]

    def _with_pair(
        self,
        weight: np.ndarray,
        site: str,
        low_rank: LowRankConfig,
        at_a: tuple[int | slice, ...],
        at: tuple[int, ...],
    ) -> np.ndarray:
        lora_a, lora_b = self._adapter[f"{site}/lora_A"][at_a], self._adapter[f"{site}/lora_B"][at]
        gains = None
        if low_rank.dora:
            kernel, a, b = (jnp.asarray(array) for array in (weight, lora_a, lora_b))
            norms = np.asarray(column_norms(kernel, a, b, low_rank.scale))
            gains = self._adapter[f"{site}/magnitude"][at] / norms
        weight += (np.float32(low_rank.scale) * lora_a) @ lora_b
        if gains is not None:
            weight *= gains
        return weight


@contextmanager
def open_merger(base: BaseFolder, adapter: SavedAdapter) -> Iterator[Merger]:
    """Opens the base's files.

    Args:
      base: from `base_folder.find_base`.
      adapter: of that base.
    """
    with open_shards(base.folder) as shards:
        yield Merger(shards, checked_leaves(shards, base.model), adapter)
