"""Reads and writes files of `torch.save` without PyTorch.

`torch.load` would make PyTorch a dependency for this one type of file. It also hands the pickle in
the file to an unpickler that calls functions, whereas this reader calls nothing that a file names.

Such a file is a zip archive of `data.pkl`, a pickle that describes tensors, and `data/0`, `data/1`,
..., their bytes. A pickle is a program for a stack machine. The reader interprets only the opcodes
for plain values and calls of three named functions, implemented here. It refuses everything else
and never imports a module.

The format is specified by PyTorch's source only (`torch/serialization.py`, and
`torch/_weights_only_unpickler.py` for the contents of weight files).
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax.errors import CheckpointError

_STORAGE_DTYPES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGE_DTYPES.items()}

_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"

_ADVICE = "only tensors by name are read; get the adapter as adapter_model.safetensors"

# Errors of zipfile, pickletools and the interpreter below on a damaged archive or pickle.
_DAMAGE_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


class _Global(NamedTuple):
    """A function or class that the pickle names."""

    name: str


class _Storage(NamedTuple):
    """The data of one or several tensors."""

    values: np.ndarray


class _Refused(Exception):
    """The file holds something other than named tensors."""


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
    "NEWFALSE": lambda: False,
    "NEWTRUE": lambda: True,
    "NONE": lambda: None,
}
# torch.save writes about 35 instructions for a tensor. Tensors may share an entry of the archive.
_INSTRUCTIONS, _INSTRUCTIONS_OF_ENTRY = 50_000, 100
_LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")


def read_torch_file(file: Path) -> dict[str, np.ndarray]:
    """Reads a file of `torch.save`.

    Returns:
      Tensors by name; float32, float16 or `ml_dtypes.bfloat16`.

    Raises:
      CheckpointError: the file is of another format, is damaged, or holds anything but a dictionary
        of tensors. Code in the file never runs.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _Reader(archive).tensors()
    except _Refused as error:
        raise CheckpointError(f"{file}: {error}; {_ADVICE}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{file}: is not a file of PyTorch 1.6 or later, or is truncated or damaged; download "
            "it again, or get adapter_model.safetensors"
        ) from None
    except _DAMAGE_ERRORS as error:
        raise CheckpointError(f"{file}: is damaged ({error}); download it again") from None


class _Reader:
    """Interprets the pickle of an open archive."""

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].count("/") != 1:
            raise _Refused("is a zip archive, but not from torch.save")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._prefix + "constants.pkl" in self._entries:
            raise _Refused("is a TorchScript program, not weights")
        order = self._prefix + "byteorder"
        if order in self._entries and self._read(order) != b"little":
            raise _Refused("was written on a big-endian machine")
        self._storages: dict[str, _Storage] = {}

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors of the archive by name."""
        result = self._interpret(self._read(self._prefix + "data.pkl"))
        if not isinstance(result, dict):
            raise _Refused(f"holds a {type(result).__name__} and not a dictionary of tensors")
        for name, value in result.items():
            if not isinstance(value, np.ndarray):
                raise _Refused(f"{name}: is a {type(value).__name__} and not a tensor")
        return result

    def _interpret(self, pickle: bytes) -> Any:
        """The value that the pickle describes, made of plain values and tensors."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        most = _INSTRUCTIONS + _INSTRUCTIONS_OF_ENTRY * len(self._entries)
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if count > most:
                raise _Refused(f"holds a pickle of more than {most:,} instructions")
            name = opcode.name
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                stack.append(argument)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[_int(argument)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[_int(argument)])
            elif name == "GLOBAL":
                stack.append(_known_global(str(argument)))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
            elif name == "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_item(stack[-1], key, value)
            elif name == "SETITEMS":
                items = _pop_to_mark(stack)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _set_item(stack[-1], key, value)
            elif name == "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            elif name == "BUILD" and isinstance(stack[-2], dict):
                stack.pop()  # module versions from `Module.state_dict`, not weights
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise _Refused(f"holds a pickle with the instruction {name}")
        raise ValueError("its pickle has no end")

    def _storage(self, kind: str, storage: Any, key: str, location: str, size: int) -> _Storage:
        """The storage that a persistent id of PyTorch names."""
        if kind != "storage" or getattr(storage, "name", None) not in _STORAGE_DTYPES:
            raise _Refused("holds a tensor of an unsupported type")
        if key not in self._storages:
            dtype, name = _STORAGE_DTYPES[storage.name], f"{self._prefix}data/{key}"
            data = self._read(name)
            if len(data) != size * dtype.itemsize:
                raise ValueError(f"{name} has {len(data)} bytes")
            self._storages[key] = _Storage(np.frombuffer(data, dtype))
        return self._storages[key]

    def _read(self, name: str) -> bytes:
        entry = self._entries[name]
        if entry.compress_type != zipfile.ZIP_STORED:  # torch.save never compresses
            raise _Refused("is a compressed archive, which torch.save does not write")
        return self._archive.read(entry)


def _known_global(argument: str) -> _Global:
    name = argument.replace(" ", ".")
    if argument in (*_STORAGE_DTYPES, _REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT):
        return _Global(argument)
    if name.startswith("torch.") and name.endswith("Storage"):
        raise _Refused(f"holds a {name}; supported: float32, float16, bfloat16")
    raise _Refused(f"holds a pickle that calls {name}, which was not run")


def _call(function: Any, arguments: Any) -> Any:
    """The result of a call of one of the three known functions."""
    name = getattr(function, "name", None)
    if name == _ORDERED_DICT and arguments == ():
        return {}
    if name == _REBUILD_PARAMETER:
        return arguments[0]
    if name == _REBUILD_TENSOR:
        return _view(*arguments[:4])
    raise _Refused("holds a pickle that calls something other than tensor constructors")


def _view(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> np.ndarray:
    """A tensor of `size` and `stride`, in elements, that begins at `offset` of its storage."""
    values = storage.values
    counts = [_int(count) for count in (offset, *size, *stride)]
    if len(size) != len(stride) or min(counts) < 0:
        raise ValueError("a tensor's shape is impossible")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= values.size:
        raise ValueError("a tensor reaches beyond its bytes")
    if math.prod(size) > values.size:
        raise ValueError("a tensor repeats its bytes")
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    """Removes the values above the topmost mark, and the mark, from the stack."""
    position = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
    values = stack[position + 1 :]
    del stack[position:]
    return values


def _set_item(target: Any, key: Any, value: Any) -> None:
    if not isinstance(target, dict) or not isinstance(key, str):
        raise _Refused("holds something else than tensors by name")
    if key in target:
        raise ValueError(f"{key} occurs twice")
    target[key] = value


def _int(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not an integer")
    return value


def write_torch_file(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as `torch.save` does, for `torch.load(file, weights_only=True)`.

    Args:
      file: path of the new file.
      tensors: tensors by name; float32, float16 or `ml_dtypes.bfloat16`.

    Raises:
      OSError: the disk is full or not writable.
    """
    pickle = [b"\x80\x02}("]  # protocol 2, an empty dict, a mark for its items
    for index, (name, tensor) in enumerate(tensors.items()):
        pickle += [_text(name), _pickled_tensor(str(index), tensor)]
    pickle.append(b"u.")
    with zipfile.ZipFile(file, "w") as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"{file.stem}/{name}"), data)

        add("data.pkl", b"".join(pickle))
        add("byteorder", b"little")
        for index, tensor in enumerate(tensors.values()):
            little = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
            add(f"data/{index}", np.ascontiguousarray(little).tobytes())
        add("version", b"3\n")


def _pickled_tensor(key: str, tensor: np.ndarray) -> bytes:
    """Opcodes that push the tensor with the bytes `data/<key>` onto the stack."""
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
    storage_id = (
        _text("storage"),
        _global(_STORAGE_NAMES[tensor.dtype]),
        _text(key),
        _text("cpu"),
        _number(tensor.size),
    )
    arguments = (
        _tuple(*storage_id) + b"Q",
        _number(0),
        _tuple(*map(_number, tensor.shape)),
        _tuple(*map(_number, strides)),
        b"\x89",  # requires_grad=False
        _global(_ORDERED_DICT) + b")R",  # no hooks
    )
    return _global(_REBUILD_TENSOR) + _tuple(*arguments) + b"R"


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _number(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little")
