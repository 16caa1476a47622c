"""The fingerprint of a base model: a hash of all bytes of its tensors, made in the background."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import xxhash

from moe_jax.errors import CheckpointError
from moe_jax.files.atomic import write_atomic
from moe_jax.files.cache import cache_folder
from moe_jax.hf.shards import Shards, open_shards

_SAMPLED_ROWS = 4
_BLOCK_BYTES = 2**18

# A file that changes twice within the resolution of its time stamps looks unchanged.
_SETTLED_SECONDS = 2.0


class BaseContent:
    """Content of the tensors of a base model.

    The hash of all bytes is computed in a thread, which begins here. It is then remembered in the
    cache folder for files of the same path, size, time and inode, and made again if the sample
    differs.

    Attributes:
      sample: hash of the names, types and shapes of the tensors, and of four evenly spaced rows of
        each. Takes well under a second for 7B parameters, and any training changes it.
    """

    def __init__(self, shards: Shards):
        """Hashes the sample of the open files of a checkpoint, and begins with the rest."""
        self.sample = _sample(shards)
        self._hash: concurrent.futures.Future[str] = concurrent.futures.Future()
        names = {info.file for info in shards.tensors.values()}
        files = sorted(shards.folder / name for name in names)
        state = _state(files)
        known = _remembered(state, self.sample)
        if known is not None:
            self._hash.set_result(known)
            return
        threading.Thread(
            target=self._compute, args=(shards.folder, files, state), name="base content"
        ).start()

    @property
    def is_hashed(self) -> bool:
        """True if `fingerprint` does not wait."""
        return self._hash.done()

    def wait(self) -> None:
        """Waits until all bytes are hashed; raises as `fingerprint` does."""
        self._hash.result()

    @property
    def fingerprint(self) -> str:
        """Hash of all bytes, a colon, and `sample`; waits until all bytes are read.

        It depends neither on the distribution of the tensors over files nor on the folder's name.

        Raises:
          CheckpointError: a file cannot be read, or changed meanwhile.
        """
        return f"{self._hash.result()}:{self.sample}"

    def _compute(self, folder: Path, files: list[Path], state: list[list[str | int]]) -> None:
        try:
            tensors: dict[str, str] = {}
            for file in files:
                tensors |= _tensor_hashes(file)
            if _state(files) != state:
                raise CheckpointError(
                    f"{folder}: its weights changed while they were read; run the command again"
                )
            content = hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()[:32]
            _remember(files, state, self.sample, content)
        except OSError as error:
            reason = error.strerror or error
            self._hash.set_exception(CheckpointError(f"{folder}: cannot be read ({reason})"))
        except BaseException as error:  # noqa: BLE001  # raised where the result is used
            self._hash.set_exception(error)
        else:
            self._hash.set_result(content)


def base_fingerprint(folder: Path) -> str:
    """Fingerprint of the checkpoint in a folder; see `BaseContent.fingerprint`.

    Raises:
      CheckpointError: the files are missing, truncated or damaged.
    """
    with open_shards(folder) as shards:
        return BaseContent(shards).fingerprint


def _sample(shards: Shards) -> str:
    digest = hashlib.sha256()
    for name, info in sorted(shards.tensors.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        view = shards.get_slice(name)
        rows = info.shape[0] if info.shape else 0
        samples = range(_SAMPLED_ROWS if rows else 0)
        for row in dict.fromkeys(rows * i // _SAMPLED_ROWS for i in samples):
            digest.update(np.ascontiguousarray(view[row : row + 1]).tobytes())
    return digest.hexdigest()


def _tensor_hashes(file: Path) -> dict[str, str]:
    """Hash of the bytes of each tensor of a safetensors file, by name.

    Names, types and shapes are part of the sample.
    """
    hashes, buffer = {}, memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))  # the library has checked it
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = tensor["data_offsets"]
            stream.seek(8 + header_bytes + start)
            tensor_hash, left = xxhash.xxh3_128(), stop - start
            while left:
                if not threading.main_thread().is_alive():
                    raise CheckpointError("the process ends")
                count = stream.readinto(buffer[:left])
                if not count:
                    raise CheckpointError(f"{file}: ends too early; download it again")
                tensor_hash.update(buffer[:count])
                left -= count
            hashes[name] = tensor_hash.hexdigest()
    return hashes


def _state(files: list[Path]) -> list[list[str | int]]:
    """Path, size, times and inode of each file, some of which change when it is written."""
    state: list[list[str | int]] = []
    for file in files:
        status = file.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        state.append([os.path.realpath(file), status.st_size, *times, status.st_ino])
    return state


def _entry(state: list[list[str | int]]) -> Path:
    return cache_folder("bases") / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]


def _remembered(state: list[list[str | int]], sample: str) -> str | None:
    """Content hash of known files; None if their sample differs or the entry is damaged."""
    try:
        content, check = _entry(state).read_text().split()
    except (OSError, ValueError):
        return None
    return content if check == _check(content, sample) else None


def _remember(files: list[Path], state: list[list[str | int]], sample: str, content: str) -> None:
    newest = max(max(file.stat().st_mtime, file.stat().st_ctime) for file in files)
    if time.time() - newest < _SETTLED_SECONDS:
        return
    with contextlib.suppress(OSError, CheckpointError):  # then it is computed each time
        entry = _entry(state)
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(entry, f"{content} {_check(content, sample)}\n")


def _check(content: str, sample: str) -> str:
    return hashlib.sha256(f"{content} {sample}".encode()).hexdigest()[:32]
