"""Files of `torch.save`, read and written without PyTorch and without running what is in them.

Such a file is a zip archive: `data.pkl`, a pickle that names tensors, and `data/0`, `data/1`, ...,
their bytes. A pickle is a program for a stack machine, which Python's own machine lets call any
function there is. So it is not given to that machine: of its opcodes, the ones that make plain
values are carried out here, and where it calls a function, the name has to be one of four, each of
which stands for a few lines of this file. Anything else is refused; nothing is ever imported.

The format has no specification but PyTorch's source (`torch/serialization.py`, and
`torch/_weights_only_unpickler.py` for what a file of weights may hold).
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

_STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}

_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
_FUNCTIONS = (_TENSOR, _PARAMETER, _ORDERED_DICT)

_SAFER = "only tensors by name are read; get the adapter as adapter_model.safetensors"


class _Global(NamedTuple):
    """A function or class that the pickle names."""

    name: str


class _Storage(NamedTuple):
    """The numbers that one or several tensors are views of."""

    values: np.ndarray


class _Refused(Exception):
    """Something that a file of weights does not hold."""


_MARK = object()


def read_torch_file(file: Path) -> dict[str, np.ndarray]:
    """The tensors that `torch.save` wrote, by name: float32, float16 or `ml_dtypes.bfloat16`.

    Raises:
      CheckpointError: it is no such file, it is damaged, or it holds anything but a dictionary of
        tensors, code above all. None of that code has run.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _Reader(archive).tensors()
    except _Refused as error:
        raise CheckpointError(f"{file}: {error}; {_SAFER}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{file}: is no file that PyTorch 1.6 or later wrote, or it is truncated or damaged; "
            f"get it again, or as adapter_model.safetensors"
        ) from None
    # What a damaged archive or pickle leads to, from zipfile, pickletools and the stack here.
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        NotImplementedError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{file}: is damaged ({error}); get it again") from None


class _Reader:
    """One file being read."""

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in self._entries if name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].count("/") != 1:
            raise _Refused("is a zip archive, but not one of torch.save's")
        self._prefix = pickles[0].removesuffix("data.pkl")
        if self._prefix + "constants.pkl" in self._entries:
            raise _Refused("is a TorchScript program, not weights")
        order = self._prefix + "byteorder"
        if order in self._entries and self._read(order) != b"little":
            raise _Refused("was written on a big-endian machine")
        self._storages: dict[str, _Storage] = {}

    def tensors(self) -> dict[str, np.ndarray]:
        result = self._interpret(self._read(self._prefix + "data.pkl"))
        if not isinstance(result, dict):
            raise _Refused(f"holds a {type(result).__name__} and not a dictionary of tensors")
        for name, value in result.items():
            if not isinstance(value, np.ndarray):
                raise _Refused(f"{name}: is a {type(value).__name__} and not a tensor")
        return result

    def _interpret(self, pickle: bytes) -> Any:
        """What the pickle describes, of plain values and tensors."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(pickle):
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
                stack.append(tuple(_from_mark(stack)))
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_item(stack[-1], key, value)
            elif name == "SETITEMS":
                items = _from_mark(stack)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _set_item(stack[-1], key, value)
            elif name == "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            elif name == "BUILD" and isinstance(stack[-2], dict):
                stack.pop()  # versions of modules, which `Module.state_dict` adds; no weights
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise _Refused(f"holds a pickle with the instruction {name}")
        raise ValueError("its pickle has no end")

    def _storage(self, kind: str, storage: Any, key: str, location: str, size: int) -> _Storage:
        """The storage that a persistent id of PyTorch's names."""
        if kind != "storage" or getattr(storage, "name", None) not in _STORAGES:
            raise _Refused("holds a tensor of a kind that adapters do not have")
        if key not in self._storages:
            dtype, name = _STORAGES[storage.name], f"{self._prefix}data/{key}"
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


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
    "NEWFALSE": lambda: False,
    "NEWTRUE": lambda: True,
    "NONE": lambda: None,
}
_LITERALS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")


def _known_global(argument: str) -> _Global:
    name = argument.replace(" ", ".")
    if argument in _STORAGES or argument in _FUNCTIONS:
        return _Global(argument)
    if name.startswith("torch.") and name.endswith("Storage"):
        raise _Refused(f"holds a {name}; float32, float16 and bfloat16 are read")
    raise _Refused(f"holds a pickle that calls {name}, which was not run")


def _call(function: Any, arguments: Any) -> Any:
    """What calling one of `_FUNCTIONS` gives."""
    name = getattr(function, "name", None)
    if name == _ORDERED_DICT and arguments == ():
        return {}
    if name == _PARAMETER:
        return arguments[0]
    if name == _TENSOR:
        return _view(*arguments[:4])
    raise _Refused("holds a pickle that calls something else than the makers of tensors")


def _view(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> np.ndarray:
    """The tensor of `size` and `stride`, in elements, that begins at `offset` of its storage."""
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


def _from_mark(stack: list[Any]) -> list[Any]:
    """Takes everything above the topmost mark, and the mark, off the stack."""
    at = max(i for i, value in enumerate(stack) if value is _MARK)
    values = stack[at + 1 :]
    del stack[at:]
    return values


def _set_item(target: Any, key: Any, value: Any) -> None:
    if not isinstance(target, dict) or not isinstance(key, str):
        raise _Refused("holds something else than tensors by name")
    if key in target:
        raise ValueError(f"{key} is there twice")
    target[key] = value


def _int(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def write_torch_file(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as `torch.save` does, for `torch.load(file, weights_only=True)`.

    Args:
      file: is created.
      tensors: by name; float32, float16 or `ml_dtypes.bfloat16`.

    Raises:
      OSError: the disk's own.
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
    """Opcodes that leave the tensor with the bytes `data/<key>` on the stack."""
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
        b"\x89",  # requires no gradient
        _global(_ORDERED_DICT) + b")R",  # and has no hooks
    )
    return _global(_TENSOR) + _tuple(*arguments) + b"R"


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
