"""The safetensors files of a checkpoint folder as one collection of lazily read tensors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # importing it is what lets safetensors return bfloat16 arrays
import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax.errors import CheckpointError
from moe_jax.files.json_file import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
# Types that NumPy has, or has with ml_dtypes, by safetensors' names.
_DTYPES = ("F64", "F32", "F16", "BF16", "BOOL", *_INTEGERS)


@dataclass(frozen=True)
class TensorInfo:
    """Header of a tensor.

    Attributes:
      file: name of the file that holds it.
      shape: stored shape.
      dtype: safetensors' name of the type, such as `F32`, `F16` or `BF16`.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


class Shards:
    """Open safetensors files; only requested slices are read.

    Attributes:
      folder: folder of the checkpoint.
      tensors: headers of all tensors by name.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo], files: dict[str, Any]):
        self.folder = folder
        self.tensors = tensors
        self._files = files

    def get_slice(self, key: str) -> Any:
        """View of the tensor `key`; indexing it with `[start:stop, ...]` reads that part only."""
        return self._files[self.tensors[key].file].get_slice(key)


@contextmanager
def open_shards(folder: Path) -> Iterator[Shards]:
    """Opens the weights of a checkpoint: `model.safetensors`, else the files of its index.

    As in transformers, the index only names the files: their headers say which tensors they hold.
    An index of another save may list or omit a tied head.

    Raises:
      CheckpointError: a file is missing, truncated or damaged, or two files differ in a tensor.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file():  # takes precedence over an index, as in transformers
        names = [SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        names = _indexed_files(folder)
    else:
        raise CheckpointError(_no_weights(folder))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder / INDEX_FILE}: lists {name_list(missing)}, which the folder lacks; "
            f"download the checkpoint again"
        )
    files = {name: _open(folder / name) for name in names}
    try:
        tensors = {}
        for name, file in files.items():
            for key in file.keys():  # noqa: SIM118  # not a mapping
                view = file.get_slice(key)
                if view.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{folder / name}: {key}: is stored as {view.get_dtype()}, which is not "
                        "supported; use the float checkpoint that it was made from"
                    )
                if key in tensors:
                    other = tensors[key].file
                    if not np.array_equal(view[:], files[other].get_slice(key)[:]):
                        raise CheckpointError(
                            f"{folder}: {key} has other values in {other} than in {name}; the "
                            f"folder mixes files of several saves, download the checkpoint again"
                        )
                tensors[key] = TensorInfo(name, tuple(view.get_shape()), view.get_dtype())
        yield Shards(folder, tensors, files)
    finally:
        for file in files.values():
            file.__exit__(None, None, None)


def name_list(names: list[str], most: int = 4) -> str:
    """First names of a list and the number of the others, for messages."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _open(path: Path) -> Any:
    try:
        # This checks the header against the length of the file, which detects truncation.
        return safe_open(path, framework="np").__enter__()
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if file.read(19) == b"version https://git":
                raise CheckpointError(
                    f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` there"
                ) from None
        raise CheckpointError(
            f"{path}: truncated or damaged ({error}); download it again"
        ) from None


def _indexed_files(folder: Path) -> list[str]:
    """Names of the files that the index lists."""
    path = folder / INDEX_FILE
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; download it again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{path}: weight_map.{key}: {name!r} is not a file name")
        weight_map[key] = os.path.relpath(os.path.join(folder, name), folder)
        if weight_map[key].startswith(os.pardir):
            raise CheckpointError(f"{path}: weight_map.{key}: {name!r} is outside the folder")
    return sorted(set(weight_map.values()))


def _no_weights(folder: Path) -> str:
    """Message for a folder without readable weights."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    legacy = [name for name in names if name.startswith("pytorch_model") and ".bin" in name]
    if legacy:
        return (
            f"{folder}: has its weights in {legacy[0]} only, which is not read because unpickling "
            f"can run arbitrary code; convert it: {_conversion(folder)}"
        )
    other = [name for name in names if name.endswith(".safetensors")]
    for path in (folder / name for name in other):
        if not path.exists():
            return (
                f"{path}: is a link to {path.readlink()}, which does not exist; download the "
                "checkpoint again"
            )
    if "adapter_model.safetensors" in other:
        return f"{folder}: holds an adapter, not a base model; give the model it was trained on"
    if other:
        return (
            f"{folder}: has {name_list(other)} but neither {SINGLE_FILE} nor {INDEX_FILE}; "
            f"download the checkpoint again"
        )
    return (
        f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}; download the checkpoint again, or, "
        f"if the model has only pytorch_model.bin, convert it: {_conversion('MODEL')}"
    )


def _conversion(source: Path | str) -> str:
    """Command that rewrites a checkpoint as safetensors; it needs torch."""
    target = f"{source}-safetensors" if isinstance(source, Path) else "FOLDER"
    return (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"M.from_pretrained('{source}', dtype='auto').save_pretrained('{target}', "
        f"safe_serialization=True); T.from_pretrained('{source}').save_pretrained('{target}')\" "
        f"(needs torch), then give {target}"
    )
