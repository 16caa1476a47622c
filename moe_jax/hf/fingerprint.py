"""The identity of a base checkpoint, by content, so that an adapter is not put on another base."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.hf.shards import open_shards

_SAMPLES = 4


class BaseIdentity(NamedTuple):
    """Which base an adapter was trained on.

    Attributes:
      path: the folder or hub id as the configuration gave it; for people, never compared.
      fingerprint: of the content, see `base_fingerprint`.
    """

    path: str
    fingerprint: str


def base_fingerprint(folder: Path) -> str:
    """A hash of the tensors' names, types and shapes, and of samples of their values.

    Four rows, evenly spaced, are read of every tensor: any training changes some of them, and a 7B
    checkpoint takes well under a second. How the tensors are spread over files does not matter, nor
    does the folder's name.

    Args:
      folder: a checkpoint with safetensors weights.

    Raises:
      CheckpointError: the files are missing, truncated or damaged.
    """
    digest = hashlib.sha256()
    with open_shards(folder) as shards:
        for name, info in sorted(shards.tensors.items()):
            digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            view = shards.get_slice(name)
            rows = info.shape[0] if info.shape else 0
            for row in dict.fromkeys(rows * i // _SAMPLES for i in range(_SAMPLES if rows else 0)):
                digest.update(np.ascontiguousarray(view[row : row + 1]).tobytes())
    return digest.hexdigest()
