"""Files of torch.save, read and written without torch; everything but tensors is refused."""

import os
import pickle
import struct
import sys
import time
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from moe_jax.errors import CheckpointError
from moe_jax.exchange.torch_files import read_torch_file, write_torch_file

DTYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}


def bits(tensor):
    """Bit patterns of a tensor of torch or numpy."""
    if isinstance(tensor, torch.Tensor):
        width = torch.int32 if tensor.dtype == torch.float32 else torch.int16
        return tensor.detach().contiguous().view(width).numpy()
    return np.array(tensor, order="C").view(np.int32 if tensor.itemsize == 4 else np.int16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_reads_written_files(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (3, 5), "b": (7,), "c": (2, 3, 4), "scalar": (), "empty": (0, 4)}
    tensors = {n: rng.standard_normal(s).astype(DTYPES[dtype]) for n, s in shapes.items()}
    tensors["turned"] = tensors["a.weight"].T
    write_torch_file(tmp_path / "w.bin", tensors)
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "w.bin", weights_only=True, mmap=mmap)
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == dtype
            np.testing.assert_array_equal(bits(loaded[name]), bits(tensor), strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_written_by_torch_are_read(tmp_path, dtype):
    torch.manual_seed(0)
    whole = torch.randn(6, 8).to(dtype)
    module = torch.nn.Linear(3, 2).to(dtype)
    for tensors in (
        {"turned": whole.T, "part": whole[1:3, ::2], "again": whole, "row": whole[2]},
        dict(module.named_parameters()),
        module.state_dict(),  # with versions of modules
        OrderedDict(a=whole),
        {},
    ):
        torch.save(tensors, tmp_path / "t.bin")
        actual = read_torch_file(tmp_path / "t.bin")
        assert list(actual) == list(tensors)
        for name, tensor in tensors.items():
            assert actual[name].dtype == DTYPES[dtype]
            np.testing.assert_array_equal(bits(actual[name]), bits(tensor), strict=True)


class Call:
    """An object that pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(tmp_path, value, **kwargs):
    torch.save(value, tmp_path / "bad.bin", **kwargs)
    return tmp_path / "bad.bin"


def archive(tmp_path, data, **entries):
    """Writes an archive like that of torch.save around the pickle `data`."""
    with zipfile.ZipFile(tmp_path / "bad.bin", "w") as file:
        for name, content in {"data.pkl": data, "version": b"3\n", **entries}.items():
            file.writestr(f"bad/{name}", content)
    return tmp_path / "bad.bin"


def refusal(file):
    with pytest.raises(CheckpointError) as error:
        read_torch_file(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def raw(opcodes):
    return b"\x80\x02" + opcodes


# A tensor of two floats in `data/0`, as torch.save writes it; size and stride are placeholders.
FLOATS = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
    b"X\x01\0\0\0" + b"0X\x03\0\0\0cpuK\x02tQK\0K%c\x85K%c\x85\x89ccollections\nOrderedDict\n)RtR"
)


def test_code_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "it ran"
    touch = Call(os.system, f"touch '{marker}'")
    opened = f"open({str(marker)!r}, 'w')"
    for name, value in (
        ("system", touch),
        ("eval", Call(eval, opened)),
        ("exec", {"a": torch.zeros(2), "b": Call(exec, opened)}),
        ("open", {"a": torch.nn.Parameter(torch.zeros(2)), "b": {"c": Call(open, marker, "w")}}),
        ("loads", {"a": Call(pickle.loads, pickle.dumps(touch))}),
    ):
        assert f"{name}, which was not run" in refusal(saved(tmp_path, value))
    # A name on the stack, instructions of other protocols, and an import without a call.
    strings = b"X\x05\0\0\0posixX\x06\0\0\0system"
    command = f"touch '{marker}'".encode()
    argument = b"X" + struct.pack("<I", len(command)) + command
    for opcodes in (
        strings + b"\x93" + argument + b"\x85R.",  # STACK_GLOBAL
        b"(" + argument + b"iposix\nsystem\n.",  # INST
        b"}(X\x01\0\0\0acantigravity\ngeohash\nu.",  # GLOBAL alone imports the module
        b"\x82\x01.",  # EXT1
    ):
        words = refusal(archive(tmp_path, raw(opcodes)))
        assert "only tensors by name are read" in words
    assert not marker.exists()
    assert "antigravity" not in sys.modules

    # torch.load without weights_only runs it, so the attack is real.
    torch.load(saved(tmp_path, touch), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([torch.zeros(2)], "the instruction EMPTY_LIST"),
        (torch.zeros(2), "holds a ndarray and not a dictionary"),
        ({"a": 3}, "a: is a int and not a tensor"),
        ({"a": {"b": torch.zeros(2)}}, "a: is a dict and not a tensor"),
        ({3: torch.zeros(2)}, "something else than tensors by name"),
        (
            {"a": torch.zeros(2, dtype=torch.int64)},
            "holds a torch.LongStorage; supported: float32",
        ),
        ({"a": torch.zeros(2, dtype=torch.float64)}, "holds a torch.DoubleStorage"),
        ({"a": torch.zeros(1).expand(5)}, "repeats its bytes"),
        ({"a": torch.zeros(2, device="meta")}, "only tensors by name"),
        ({"a": torch.float32}, "calls torch.float32"),
        ({"a": torch.zeros(2).to_sparse()}, "only tensors by name"),
    ],
)
def test_other_values_than_float_tensors_are_refused(tmp_path, value, words):
    assert words in refusal(saved(tmp_path, value))


def test_other_files_are_refused(tmp_path):
    file = saved(tmp_path, {"a": torch.zeros(100)})
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    assert "truncated" in refusal(file)
    file.write_bytes(whole.replace(bytes(400), b"x" * 400))
    assert "or damaged" in refusal(file)  # by the archive's checksum
    file.write_text("hello")
    assert "is not a file of PyTorch 1.6 or later" in refusal(file)
    old = saved(tmp_path, {"a": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    assert "is not a file of PyTorch 1.6 or later" in refusal(old)
    assert "is damaged" in refusal(tmp_path / "gone.bin")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as compressed:
        compressed.writestr("bad/data.pkl", raw(b"}."))
    assert "compressed" in refusal(file)
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("hello.txt", "hello")
    assert "but not from torch.save" in refusal(file)
    assert "TorchScript" in refusal(archive(tmp_path, raw(b"}."), **{"constants.pkl": b""}))
    assert "big-endian" in refusal(archive(tmp_path, raw(b"}."), byteorder=b"big"))


def test_inconsistent_pickles_are_refused(tmp_path):
    entries = {"data/0": struct.pack("<2f", 1.0, 2.0)}
    item = b"X\x01\0\0\0a"
    good = archive(tmp_path, raw(b"}(" + item + FLOATS % (2, 1) + b"u."), **entries)
    np.testing.assert_array_equal(read_torch_file(good)["a"], [1.0, 2.0])
    for opcodes, words in (
        (b"}(" + item + FLOATS % (3, 1) + b"u.", "reaches beyond its bytes"),
        (b"}(" + item + FLOATS % (2, 9) + b"u.", "reaches beyond its bytes"),
        (b"}(" + item + FLOATS % (2, 1) + item + FLOATS % (2, 1) + b"u.", "a occurs twice"),
        (b"}(" + item + b"u.", "is damaged"),
        (b"}", "is damaged"),
        (b"u.", "is damaged"),
        (b"h\x07.", "is damaged"),
        (b"K\x01)R.", "calls something other"),
        (b"ccollections\nOrderedDict\nK\x01\x85R.", "calls something other"),
    ):
        assert words in refusal(archive(tmp_path, raw(opcodes), **entries)), opcodes
    assert "is damaged" in refusal(archive(tmp_path, raw(b"}(" + item + FLOATS % (2, 1) + b"u.")))
    short = {"data/0": entries["data/0"][:4]}
    file = archive(tmp_path, raw(b"}(" + item + FLOATS % (2, 1) + b"u."), **short)
    assert "data/0 has 4 bytes" in refusal(file)


def test_a_pickle_of_two_million_instructions_ends_early(tmp_path):
    file = tmp_path / "long.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + b"(t" * 10**6 + b".")
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"a pickle of more than 50,\d00 instructions"):
        read_torch_file(file)
    assert time.process_time() - start < 5  # 20 s without the bound


def test_an_adapter_of_many_tensors(tmp_path):
    tensors = {f"layer {i}": np.full((1, 2), i, np.float32) for i in range(3000)}
    write_torch_file(tmp_path / "w.bin", tensors)  # 90,000 instructions
    loaded = read_torch_file(tmp_path / "w.bin")
    assert loaded.keys() == tensors.keys() and loaded["layer 7"].tolist() == [[7.0, 7.0]]
