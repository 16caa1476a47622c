"""What the formats have in common that write a whole model, and not an adapter alone."""

import abc
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.lora.dora import column_norms
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.tree import MOE
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.model import FloatType, ModelConfig
from moe_jax.errors import CheckpointError
from moe_jax.exchange.format import Export, ExportOptions, ExportOutcome, Format
from moe_jax.hf.key_table import Leaf, TensorParts, tensor_parts
from moe_jax.hf.load import checked_leaves, read_leaf
from moe_jax.hf.shards import INDEX_FILE, SINGLE_FILE, Shards, open_shards
from moe_jax.loaded.base_folder import BaseFolder, find_base

_CONFIG = "config.json"

# What stands beside the weights of a checkpoint and goes with the model.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)

_TOKENIZERS = ("tokenizer", "vocab.json", "spiece.model")


class Recipe(NamedTuple):
    """A tensor of the checkpoint to be written.

    Attributes:
      name: in the checkpoint.
      shape: as stored.
      make: makes it.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[Merger], np.ndarray]


class Plan(NamedTuple):
    """How an adapter and its base become another checkpoint.

    Attributes:
      config: its `config.json`, but for the type of its tensors.
      recipes: its tensors, layer by layer.
      approximation: in what it departs from the adapter on its base, for the model card; None if
        the two compute the same.
      measure: given the folder with the finished weights, the KL divergence from the exact model in
        nats per token; None if it is not asked for.
    """

    config: dict[str, Any]
    recipes: list[Recipe]
    approximation: str | None = None
    measure: Callable[[Path], float] | None = None


class ModelFormat(Format):
    """A format that holds a base and an adapter as one model, in Hugging Face's folder.

    Memory holds a few copies of one matrix while it is written.
    """

    library = "transformers"

    def loading(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{options.name}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{options.name}")'
        )

    @abc.abstractmethod
    def plan(
        self,
        adapter: SavedAdapter,
        base: BaseFolder,
        config: dict[str, Any],
        options: ExportOptions,
    ) -> Plan:
        """Decides what is written.

        Args:
          adapter: passed `check`; its weights are those of its method.
          base: the base that it was trained on.
          config: the base's `config.json`.
          options: of the export.

        Raises:
          CheckpointError: as in `Format.prepare`.
        """

    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        base = find_base(adapter, options.base)
        stated = json.loads((base.folder / _CONFIG).read_text(encoding="utf-8"))
        plan = self.plan(adapter, base, stated, options)
        # Under both of the names that versions of transformers know it by.
        config = {**plan.config, "dtype": options.dtype, "torch_dtype": options.dtype}
        copied = {f for pattern in _COPIED for f in base.folder.glob(pattern) if f.is_file()}
        notes: list[str] = []
        if not any(file.name.startswith(_TOKENIZERS) for file in copied):
            notes.append("no tokenizer: the base's folder holds none; copy one beside the model")

        def write(folder: Path) -> ExportOutcome:
            (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in sorted(copied):
                shutil.copyfile(file, folder / file.name)
            with open_merger(base, adapter) as merger:
                tensors = [
                    LazyTensor(name, shape, functools.partial(make, merger))
                    for name, shape, make in plan.recipes
                ]
                write_weights(folder, tensors, options.dtype)
            divergence = None if plan.measure is None else plan.measure(folder)
            if divergence is not None:
                notes.append(
                    f"KL divergence from the exact model, measured: {divergence:.4g} nats per token"
                )
            product = f"a `{config['architectures'][0]}`"
            return ExportOutcome(product, True, plan.approximation, divergence)

        size = weights_bytes([recipe.shape for recipe in plan.recipes], options.dtype)
        size += sum(file.stat().st_size for file in copied) + 2**16
        return Export(size, write, notes)


def base_tensors(model: ModelConfig) -> list[tuple[str, TensorParts]]:
    """A base's tensors: those outside its layers, then layer by layer."""

    def layer(item: tuple[str, TensorParts]) -> int:
        leaf, index = item[1][0]
        return index if leaf.stacked else -1

    return sorted(tensor_parts(model).items(), key=layer)


def stored_shape(parts: TensorParts) -> tuple[int, ...]:
    """The shape of a base's tensor as it is stored."""
    return parts[0][0].tensor_shape


def as_stored(parts: TensorParts, make: Callable[[str, int], np.ndarray]) -> np.ndarray:
    """A base's tensor as it is stored, of its leaves.

    Args:
      parts: its entry in `tensor_parts`.
      make: makes a leaf of its path and layer, as `Merger.merged` does.
    """
    arrays = []
    for leaf, layer in parts:
        array = make("/".join(leaf.path), layer)
        arrays.append(array.T if leaf.transposed else array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


# FIXME docstring of the merged exchange.merging:
# """The weights of a base with an adapter's pairs in them, one matrix at a time.
#
# A pair on a frozen matrix W is one matrix again: `W + s A B`, and with DoRA that times the gains,
# `m / ||W + s A B||` for each column. Where experts share W, each has such a matrix.
# """


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


# FIXME docstring of the merged exchange.sharded_writer:
# """Writes the weights of a whole model as safetensors, one tensor in memory at a time.
#
# `safetensors.numpy.save_file` wants all tensors of a file at once. The format is simple enough to be
# written as it goes: the length of a JSON header, the header with every tensor's place, the data.
# """


MAX_SHARD_BYTES = 5 * 10**9
"""How large a file may get; transformers' own default for a long time."""

_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BLOCK_BYTES = 2**22


class LazyTensor(NamedTuple):
    """A tensor that is made when its turn comes.

    Attributes:
      name: in the checkpoint.
      shape: as stored.
      make: returns it; of any float type and memory order.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def num_bytes(self, dtype: FloatType) -> int:
        """Its size in a file."""
        return tensor_bytes(self.shape, dtype)


def tensor_bytes(shape: tuple[int, ...], dtype: FloatType) -> int:
    """The size of a tensor in a file."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def weights_bytes(shapes: Sequence[tuple[int, ...]], dtype: FloatType) -> int:
    """What `write_weights` takes on the disk for tensors of these shapes, at most."""
    # A tensor's entries in the header and the index take a few hundred bytes.
    return sum(tensor_bytes(shape, dtype) + 512 for shape in shapes) + 4096


def write_weights(folder: Path, tensors: Sequence[LazyTensor], dtype: FloatType) -> None:
    """Writes `model.safetensors`, or several files and their index.

    Args:
      folder: exists.
      tensors: in the order in which they are made and stored.
      dtype: of all of them.

    Raises:
      CheckpointError: a tensor has values that are not finite in `dtype`.
      OSError: the disk's own.
    """
    shards = _split(tensors, dtype)
    if len(shards) == 1:
        _write_shard(folder / SINGLE_FILE, shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, dtype)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
    total = sum(tensor.num_bytes(dtype) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Sequence[LazyTensor], dtype: FloatType) -> list[list[LazyTensor]]:
    """Runs of tensors of at most `MAX_SHARD_BYTES`, or of a single larger one."""
    shards: list[list[LazyTensor]] = []
    room = 0
    for tensor in tensors:
        size = tensor.num_bytes(dtype)
        if not shards or size > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_shard(file: Path, tensors: Sequence[LazyTensor], dtype: FloatType) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes(dtype)
        header[tensor.name] = {
            "dtype": _STORED[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(opened, tensor, dtype)


def _write_tensor(file: BinaryIO, tensor: LazyTensor, dtype: FloatType) -> None:
    """Appends a tensor's data, converted a block of rows at a time."""
    array = tensor.make()
    if array.shape != tensor.shape:
        raise ValueError(f"{tensor.name}: made with shape {array.shape}, not {tensor.shape}")
    rows = max(1, _BLOCK_BYTES * array.shape[0] // max(1, array.nbytes))
    for start in range(0, array.shape[0], rows):
        with np.errstate(over="ignore"):  # looked for below, with a message that says where
            block = array[start : start + rows].astype(jnp.dtype(dtype), order="C")
        if not np.isfinite(block).all():
            raise CheckpointError(
                f"{tensor.name}: has values that are not finite in {dtype}; use another dtype"
            )
        file.write(block.view(np.uint8).data)
