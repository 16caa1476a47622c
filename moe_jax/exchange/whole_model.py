"""The frame of formats that write a base and an adapter as one Hugging Face checkpoint.

`MergedWeights` computes the weights of the base with the adapter's pairs in them, one matrix at a
time: a pair on a frozen matrix W gives `W + s A B`, and with DoRA that matrix times the gains,
`m / ||W + s A B||` for each column. `write_weights` writes them as safetensors, one tensor in
memory at a time. (`safetensors.numpy.save_file` needs all tensors of a file at once. The format is
simple: the length of a JSON header, the header with the offsets of every tensor, the data.)
"""

import abc
import collections
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
from moe_jax.exchange.new_tokens import (
    extended_model,
    extended_table,
    extended_tokenizer,
)
from moe_jax.hf.base_model import BaseModel
from moe_jax.hf.config import read_config_file
from moe_jax.hf.key_table import Leaf, TensorParts, tensor_parts
from moe_jax.hf.load import checked_leaves, read_leaf
from moe_jax.hf.shards import INDEX_FILE, SINGLE_FILE, Shards, open_shards
from moe_jax.hf.wrapper import language_model_fields
from moe_jax.loaded.adapter_base import open_adapter_base

MAX_SHARD_BYTES = 5 * 10**9
"""Maximum size of a safetensors file; the long-time default of transformers."""

_CONFIG_FILE = "config.json"

# Files of the base's checkpoint that are copied beside the weights.
_COPIED_FILES = (
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

# Files of the base's tokenizer that transformers may read in place of the `tokenizer.json` of one
# with new tokens.
_FORMER_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json", "tokenizer.model")

_TOKENIZER_PREFIXES = ("tokenizer", "vocab.json", "spiece.model")
_DTYPES: dict[str, FloatType] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_STORED_DTYPES = {dtype: name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 2**22
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


class Plan(NamedTuple):
    """The checkpoint that an adapter and its base become.

    Attributes:
      config: its `config.json` without the dtype.
      tensors: its tensors, layer by layer.
      approximation: the approximation that was made, for the model card; None if the checkpoint
        computes the same as the adapter on its base.
      measure: computes the KL divergence from the exact model in nats per token, given the folder
        with the finished weights; None if it is not measured.
    """

    config: dict[str, Any]
    tensors: list[LazyTensor]
    approximation: str | None = None
    measure: Callable[[Path], float] | None = None


class ModelFormat(Format):
    """A format that stores a base and an adapter as one Hugging Face checkpoint.

    Writing it needs memory for a few matrices.
    """

    library = "transformers"
    adds_tokens = True

    def loading_code(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{options.location}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{options.location}")'
        )

    @abc.abstractmethod
    def plan(
        self, adapter: SavedAdapter, base: BaseModel, config: dict[str, Any], options: ExportOptions
    ) -> Plan:
        """The checkpoint to write.

        Args:
          adapter: an adapter that passed `check`, with the leaves of its method.
          base: the base that the adapter was trained on.
          config: the base's `config.json`; of its language model only, if it also reads images.
          options: options of the export.

        Raises:
          CheckpointError: see `Format.prepare`.
        """

    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        base = open_adapter_base(adapter, options.base)
        base_config = dict(language_model_fields(read_config_file(base.folder), str(base.folder)))
        tokenizer = extended_tokenizer(adapter, base.folder)
        if tokenizer is not None:
            base_config["vocab_size"] = extended_model(base.config, adapter.method).vocab_size
        plan = self.plan(adapter, base, base_config, options)
        dtype = options.dtype or stored_dtype(base)
        # transformers 5 reads `dtype`, the versions before it `torch_dtype`.
        config = {**plan.config, "dtype": dtype, "torch_dtype": dtype}
        copied = {f for pattern in _COPIED_FILES for f in base.folder.glob(pattern) if f.is_file()}
        notes: list[str] = []
        if not any(file.name.startswith(_TOKENIZER_PREFIXES) for file in copied):
            notes.append("no tokenizer: the base's folder has none; copy one into the export")
        if base.unread_note is not None:
            notes.append(base.unread_note)

        def write(folder: Path) -> ExportOutcome:
            (folder / _CONFIG_FILE).write_text(
                json.dumps(config, indent=2) + "\n", encoding="utf-8"
            )
            for file in sorted(copied):
                shutil.copyfile(file, folder / file.name)
            if tokenizer is not None:  # replaces the base's
                for name in _FORMER_TOKENIZER_FILES:
                    (folder / name).unlink(missing_ok=True)
                tokenizer.save_pretrained(folder)
            with open_merged_weights(base, adapter) as weights:
                write_weights(folder, plan.tensors, weights, dtype)
            divergence = None if plan.measure is None else plan.measure(folder)
            if divergence is not None:
                notes.append(
                    f"KL divergence from the exact model, measured: {divergence:.4g} nats per token"
                )
            description = f"a `{config['architectures'][0]}`"
            return ExportOutcome(description, True, plan.approximation, divergence)

        # A tensor's entries in the header and the index take a few hundred bytes.
        size = sum(tensor.num_bytes(dtype) + 512 for tensor in plan.tensors) + 4096
        size += sum(file.stat().st_size for file in copied) + 2**16
        return Export(size, dtype, write, notes)


def stored_dtype(base: BaseModel) -> FloatType:
    """Dtype of most of a base's bytes on disk; float32 for float64."""
    sizes: collections.Counter[str] = collections.Counter()
    with open_shards(base.folder) as shards:
        for leaf in checked_leaves(shards, base.config):
            for info in (shards.tensors[key] for key in leaf.keys):
                sizes[info.dtype] += math.prod(info.shape)
    ((most, _),) = sizes.most_common(1)
    return _DTYPES.get(most, "float32")


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


def write_weights(
    folder: Path, tensors: Sequence[LazyTensor], weights: MergedWeights, dtype: FloatType
) -> None:
    """Writes `model.safetensors`, or several files and their index.

    Args:
      folder: an existing folder.
      tensors: tensors in the order in which they are computed and stored.
      weights: argument of `LazyTensor.compute`.
      dtype: dtype of the stored tensors.

    Raises:
      CheckpointError: a tensor has values that are not finite in `dtype`.
      OSError: the disk is full or not writable.
    """
    shards = _split(tensors, dtype)
    if len(shards) == 1:
        _write_shard(folder / SINGLE_FILE, shards[0], weights, dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, weights, dtype)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
    total = sum(tensor.num_bytes(dtype) for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Sequence[LazyTensor], dtype: FloatType) -> list[list[LazyTensor]]:
    """Consecutive tensors in groups of at most `MAX_SHARD_BYTES`, or of a single larger tensor."""
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


def _write_shard(
    file: Path, tensors: Sequence[LazyTensor], weights: MergedWeights, dtype: FloatType
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes(dtype)
        header[tensor.name] = {
            "dtype": _STORED_DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(opened, tensor, weights, dtype)


def _write_tensor(
    file: BinaryIO, tensor: LazyTensor, weights: MergedWeights, dtype: FloatType
) -> None:
    """Appends a tensor's data, converted in blocks of rows."""
    array = tensor.compute(weights)
    if array.shape != tensor.shape:
        raise ValueError(f"{tensor.name}: computed with shape {array.shape}, not {tensor.shape}")
    rows = max(1, _BLOCK_BYTES * array.shape[0] // max(1, array.nbytes))
    for row in range(0, array.shape[0], rows):
        with np.errstate(over="ignore"):  # checked below, with a message that names the tensor
            block = array[row : row + rows].astype(jnp.dtype(dtype), order="C")
        if not np.isfinite(block).all():
            raise CheckpointError(
                f"{tensor.name}: has values that are not finite in {dtype}; use another dtype"
            )
        file.write(block.view(np.uint8).data)
