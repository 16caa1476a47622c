"""Loads the parameters of a base model from safetensors into sharded arrays.

The files' headers are checked before any tensor is read. Then one leaf at a time is read,
transposed, converted and put on its devices. Each process reads only the parts of its devices, and
beside the parameters the host holds one leaf.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from moe_jax.config.model import ModelConfig, StorageType
from moe_jax.config.parse import located
from moe_jax.errors import CheckpointError
from moe_jax.hf.families.family import EMBEDDING_PATH, HEAD_PATH, ROTARY_BUFFER
from moe_jax.hf.key_table import (
    Leaf,
    base_leaves,
    by_tensor_name,
    is_beside_model,
    tensor_name,
    unexpected_reason,
)
from moe_jax.hf.shards import Shards, name_list, open_shards
from moe_jax.layers.frozen import Storage, check_storage, storage_of
from moe_jax.layers.quantized import quantize

_FLOAT_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}

# Bytes of a tensor that are read at once. safetensors copies a slice twice on its way to numpy, so
# reading whole tensors would cost twice the largest one; larger blocks are no faster.
_BLOCK_BYTES = 2**20

Tree = dict[str, Any]


def abstract_base_params(config: ModelConfig, dtype: str) -> Tree:
    """Parameter tree that `load_base_params` returns, with `jax.ShapeDtypeStruct` leaves."""
    storage = storage_of(dtype)

    def abstract(leaf: Leaf) -> Any:
        shape = jax.ShapeDtypeStruct(leaf.shape, storage.dtype)
        return _abstract_quantized(shape, storage) if _is_quantized(leaf, storage) else shape

    return unflatten_dict({leaf.path: abstract(leaf) for leaf in base_leaves(config)})


def load_base_params(
    folder: str | Path, config: ModelConfig, dtype: StorageType | str, shardings: Tree | None = None
) -> Tree:
    """Loads the parameters of a base model.

    Args:
      folder: checkpoint with safetensors weights, in one file or several with an index, stored as
        float32, float16, bfloat16 or float64.
      config: architecture, from `read_model_config(folder)`.
      dtype: type of the parameters. Kernels are quantized one layer at a time.
      shardings: tree of `jax.sharding.Sharding` like the returned one; None puts all parameters on
        the first device of this process.

    Returns:
      Parameter tree, with kernels `[in, out]` and decoder layers stacked as `[layers, ...]`.

    Raises:
      CheckpointError: the files are missing or damaged; a tensor is missing, unexpected, or of
        another shape or type; a value does not fit `dtype`.
      ConfigError: `dtype` is unknown, or not supported for this model.
    """
    storage = storage_of(dtype)
    with located("base"):
        check_storage(storage, config)
    with open_shards(Path(folder)) as shards:
        leaves = checked_leaves(shards, config)
        if shardings is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            leaf_shardings = {leaf.path: device for leaf in leaves}
        else:
            leaf_shardings = {leaf.path: _subtree(shardings, leaf.path) for leaf in leaves}
        arrays = {}
        # The largest first: its host copy is held while little else is.
        for leaf in sorted(leaves, key=lambda leaf: -np.prod(leaf.shape, dtype=float)):
            sharding = leaf_shardings[leaf.path]
            if _is_quantized(leaf, storage):
                arrays[leaf.path] = _load_quantized(leaf, shards, storage, sharding)
            else:
                arrays[leaf.path] = _load_leaf(leaf, shards, storage.dtype, sharding)
    return unflatten_dict({leaf.path: arrays[leaf.path] for leaf in leaves})


def checked_leaves(shards: Shards, config: ModelConfig) -> list[Leaf]:
    """Leaves to load, with the stored names of their tensors, after checking names and shapes.

    Tensors beside the model are left out, see `unread_tensors`.

    Raises:
      CheckpointError: see `load_base_params`.
    """
    leaves, present = base_leaves(config), _by_name(shards, config)
    embedding, head = tensor_name(EMBEDDING_PATH, config), tensor_name(HEAD_PATH, config)
    if config.tie_word_embeddings and embedding and head and head in present:
        # A tied head that is stored is either the only copy of the embedding or must equal it. Any
        # other head would be dropped silently.
        if embedding not in present:
            leaves = [
                dataclasses.replace(leaf, keys=(head,)) if leaf.keys == (embedding,) else leaf
                for leaf in leaves
            ]
        else:
            _check_tied_head(shards, present[embedding], present[head])
            del present[head]
    expected = {key: leaf for leaf in leaves for key in leaf.keys}
    missing = [key for key in expected if key not in present]
    if missing:
        raise CheckpointError(
            f"{shards.folder}: the weights lack {name_list(missing)}; "
            f"{_missing_reason(missing, shards, config)}"
        )
    unexpected = sorted(
        key for key in present if key not in expected and not is_beside_model(key, config)
    )
    if unexpected:
        raise CheckpointError(
            f"{shards.folder}: the weights hold {name_list(unexpected)}, which would be dropped "
            f"({unexpected_reason(unexpected[0], config)}) and change what the model computes; "
            f"config.json is that of another model"
        )
    for name, leaf in expected.items():
        key = present[name]
        info = shards.tensors[key]
        if info.shape != leaf.tensor_shape:
            raise CheckpointError(
                f"{shards.folder / info.file}: {key}: has shape {list(info.shape)}, but by "
                f"config.json it should have {list(leaf.tensor_shape)}"
            )
        if info.dtype not in _FLOAT_TYPES:
            raise CheckpointError(
                f"{shards.folder / info.file}: {key}: is stored as {info.dtype}; "
                f"supported: {', '.join(_FLOAT_TYPES)}"
            )
    return [
        dataclasses.replace(leaf, keys=tuple(present[key] for key in leaf.keys)) for leaf in leaves
    ]


def unread_tensors(shards: Shards, config: ModelConfig) -> tuple[str, ...]:
    """Stored tensors beside the model, such as other heads; without constants computed here.

    Raises:
      CheckpointError: two names are of the same tensor.
    """
    present = _by_name(shards, config)
    known = {key for leaf in base_leaves(config) for key in leaf.keys}
    known.add(tensor_name(HEAD_PATH, config) or "")
    return tuple(
        stored
        for key, stored in sorted(present.items())
        if key not in known and is_beside_model(key, config) and not ROTARY_BUFFER.search(key)
    )


def _by_name(shards: Shards, config: ModelConfig) -> dict[str, str]:
    """Stored names by the names of the tensors in the key table."""
    names = by_tensor_name(shards.tensors, config)
    for key, stored in names.items():
        if len(stored) > 1:
            raise CheckpointError(
                f"{shards.folder}: the weights hold {key} under several names, "
                f"{' and '.join(stored)}; remove one of them"
            )
    return {key: stored for key, (stored,) in names.items()}


def _missing_reason(missing: list[str], shards: Shards, config: ModelConfig) -> str:
    """Cause for which tensors are missing, and the remedy, for a message."""
    first = missing[0]
    for stored in shards.tensors:
        if stored.endswith(f".{first}"):
            prefix = stored.removesuffix(first)
            return (
                f"they are stored with the prefix {prefix!r} of a wrapper around the model; save "
                f"the model inside it with save_pretrained"
            )
    if missing == [tensor_name(HEAD_PATH, config)]:
        return (
            "the decoder was saved without its language-modeling head; add the head, or set "
            "tie_word_embeddings in config.json if it is the embedding"
        )
    return "the checkpoint is incomplete or config.json is that of another model"


def _check_tied_head(shards: Shards, embedding_key: str, head_key: str) -> None:
    head, embedding = shards.tensors[head_key], shards.tensors[embedding_key]
    equal = head.shape == embedding.shape and len(head.shape) == 2
    if equal:
        head_view, embedding_view = shards.get_slice(head_key), shards.get_slice(embedding_key)
        equal = all(
            np.array_equal(head_view[start:stop], embedding_view[start:stop])
            for start, stop in _blocks(0, head.shape[0], head.shape[1] * 4)
        )
    if not equal:
        raise CheckpointError(
            f"{shards.folder / head.file}: {head_key}: differs from {embedding_key}, although "
            f"config.json says tie_word_embeddings true; set it to false to use this head"
        )


def _load_leaf(
    leaf: Leaf, shards: Shards, dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    parts: dict[tuple, np.ndarray] = {}  # replicas share one host copy

    def read_part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if ranges not in parts:
            parts[ranges] = _read_part(leaf, shards, dtype, ranges)
        return parts[ranges]

    array = jax.make_array_from_callback(leaf.shape, sharding, read_part, dtype=dtype)
    # Transfers are asynchronous; without waiting, several host copies would accumulate.
    return jax.block_until_ready(array)


def _is_quantized(leaf: Leaf, storage: Storage) -> bool:
    """True for the kernels of the layers' projections, if `storage` quantizes."""
    return storage.quantization is not None and leaf.stacked and leaf.path[-1] == "kernel"


def _abstract_quantized(shape: jax.ShapeDtypeStruct, storage: Storage) -> Any:
    assert storage.quantization is not None
    layers, *matrix = shape.shape
    kernel = jax.ShapeDtypeStruct(tuple(matrix), jnp.float32)
    one = jax.eval_shape(functools.partial(quantize, kind=storage.quantization), kernel)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), one)


def _load_quantized(leaf: Leaf, shards: Shards, storage: Storage, shardings: Any) -> Any:
    """Loads a stacked kernel and quantizes it layer by layer; the host holds one layer as floats.

    Every process reads and quantizes the whole kernel, since a scale may span several devices, and
    keeps the parts of its devices.

    Args:
      leaf, shards: see `read_leaf`.
      storage: quantized storage.
      shardings: a `Sharding`, or a quantized kernel of shardings.
    """
    kind = storage.quantization
    assert kind is not None
    device = jax.local_devices()[0]
    layers, *_ = leaf.shape
    stack = None
    for layer in range(layers):
        kernel = jax.device_put(read_leaf(leaf, shards, np.dtype(np.float32), layer), device)
        quantized = jax.device_get(_quantize(kernel, kind))
        if stack is None:
            stack = jax.tree.map(lambda x: np.empty((layers, *x.shape), x.dtype), quantized)
        jax.tree.map(lambda whole, part, at=layer: whole.__setitem__(at, part), stack, quantized)
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, stack)

    def put(whole: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.block_until_ready(jax.tree.map(put, stack, shardings))


_quantize = jax.jit(quantize, static_argnums=1)


def read_leaf(leaf: Leaf, shards: Shards, dtype: np.dtype, layer: int | None = None) -> np.ndarray:
    """Reads a whole leaf, or one layer of a stacked leaf, as a numpy array.

    Args:
      leaf: leaf from `checked_leaves`.
      shards: shards that `checked_leaves` was given.
      dtype: type of the result.
      layer: index of the layer; None reads all layers, or a leaf that is not stacked.
    """
    ranges = tuple((0, size) for size in leaf.shape)
    if layer is None:
        return _read_part(leaf, shards, dtype, ranges)
    return _read_part(leaf, shards, dtype, ((layer, layer + 1), *ranges[1:]))[0]


def _read_part(
    leaf: Leaf, shards: Shards, dtype: np.dtype, ranges: tuple[tuple[int, int], ...]
) -> np.ndarray:
    """Reads `leaf[start:stop, ...]` for the `(start, stop)` of each axis."""
    part = np.empty([stop - start for start, stop in ranges], dtype)
    if not leaf.stacked:
        _read_tensor(leaf, leaf.keys[0], shards, part, ranges)
        return part
    first, last = ranges[0]
    for layer in range(first, last):
        _read_tensor(leaf, leaf.keys[layer], shards, part[layer - first], ranges[1:])
    return part


def _read_tensor(
    leaf: Leaf, key: str, shards: Shards, out: np.ndarray, ranges: tuple[tuple[int, int], ...]
) -> None:
    """Fills `out` with a part of one tensor, converted to the type of `out`."""
    info = shards.tensors[key]
    source = _FLOAT_TYPES[info.dtype]
    view = shards.get_slice(key)
    if leaf.transposed:
        out, ranges = out.T, ranges[::-1]
    first, last = (row + leaf.first_row for row in ranges[0])
    rest = tuple(slice(*part) for part in ranges[1:])
    row_bytes = np.dtype(source).itemsize * int(np.prod([b - a for a, b in ranges[1:]]))
    may_overflow = source is np.float64 or (out.dtype == np.float16 and source is not np.float16)
    for start, stop in _blocks(first, last, row_bytes):
        block = view[(slice(start, stop), *rest)]
        with np.errstate(over="ignore"):  # checked below, with a message that names the tensor
            out[start - first : stop - first] = block
        if may_overflow and not np.isfinite(out[start - first : stop - first]).all():
            raise CheckpointError(
                f"{shards.folder / info.file}: {key}: has values that {out.dtype} cannot hold "
                f"(beyond {float(jnp.finfo(out.dtype).max):.5g}); use base.param_dtype 'bfloat16' "
                f"or 'float32'"
            )


def _blocks(first: int, last: int, row_bytes: int) -> list[tuple[int, int]]:
    """Splits rows `first` to `last` into blocks of about `_BLOCK_BYTES`."""
    rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
    return [(start, min(start + rows, last)) for start in range(first, last, rows)]


def _subtree(tree: Tree, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
