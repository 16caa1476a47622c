"""The frame of formats that write a base and an adapter as one Hugging Face checkpoint.

`write_weights` writes its tensors as safetensors, one in memory at a time.
(`safetensors.numpy.save_file` needs all tensors of a file at once. The format is simple: the length
of a JSON header, the header with the offsets of every tensor, the data.)
"""

import abc
import collections
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import FloatType
from moe_jax.errors import CheckpointError
from moe_jax.exchange.format import Export, ExportOptions, ExportOutcome, Format
from moe_jax.exchange.merged_weights import LazyTensor, MergedWeights, open_merged_weights
from moe_jax.exchange.new_tokens import extended_model, extended_tokenizer
from moe_jax.hf.base_model import BaseModel
from moe_jax.hf.config import read_config_file
from moe_jax.hf.load import checked_leaves
from moe_jax.hf.shards import INDEX_FILE, SINGLE_FILE, open_shards
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
