"""Writes the weights of a whole model as safetensors, one tensor in memory at a time.

`safetensors.numpy.save_file` wants all tensors of a file at once. The format is simple enough to be
written as it goes: the length of a JSON header, the header with every tensor's place, the data.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax.config.model import FloatType
from moe_jax.errors import CheckpointError
from moe_jax.hf.shards import INDEX_FILE, SINGLE_FILE

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
