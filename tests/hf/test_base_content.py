"""Every byte of a base decides its fingerprint, which is made once and beside the loading."""

import os
import threading
import time

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from moe_jax.demo.tiny_llama import write_checkpoint
from moe_jax.errors import CheckpointError
from moe_jax.files.cache import cache_folder
from moe_jax.hf import base_content
from moe_jax.hf.base_content import base_fingerprint
from moe_jax.hf.base_model import BaseIdentity, open_base
from moe_jax.hf.load import load_base_params

SMALL = dict(hidden_size=16, intermediate_size=24, head_dim=8, vocab_size=40, num_hidden_layers=2)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base whose files count as old, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base_content, "_SETTLED_SECONDS", -1.0)
    write_checkpoint(tmp_path / "base", seed=0, shards=2, **SMALL)
    return tmp_path / "base"


def weights(base):
    return sorted(base.glob("*.safetensors"))


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_hashes_of_tensors(base):
    for file in weights(base):
        expected = {k: xxhash.xxh3_128(v.tobytes()).hexdigest() for k, v in load_file(file).items()}
        assert base_content._tensor_hashes(file) == expected


def test_every_flipped_byte_is_refused(base):
    trained_on = open_base(base).identity
    rng = np.random.default_rng(0)
    sampled = 0
    for _ in range(60):
        file = weights(base)[rng.integers(2)]
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        at = rng.integers(header, file.stat().st_size)
        flip(file, at)
        with pytest.raises(CheckpointError, match=r"run: was trained on the base .* differ"):
            open_base(base).require_trained_on("run", trained_on, "give that base")
        sampled += open_base(base).content.sample != trained_on.sample
        flip(file, at)
    open_base(base).require_trained_on("run", trained_on, "give that base")
    assert sampled < 30  # most are outside the sampled rows


def test_known_files_are_not_read_again(base, monkeypatch):
    before = base_fingerprint(base)
    monkeypatch.setattr(base_content, "_tensor_hashes", None)

    opened = open_base(base)

    assert opened.content.is_hashed and opened.content.fingerprint == before


def test_a_change_under_the_former_time_is_seen(base):
    before, file = base_fingerprint(base), weights(base)[0]
    status = file.stat()
    flip(file, status.st_size - 1)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns

    assert base_fingerprint(base) != before


def test_new_files_are_not_remembered(base, monkeypatch):
    monkeypatch.setattr(base_content, "_SETTLED_SECONDS", 3600.0)
    base_fingerprint(base)
    assert not cache_folder("bases").exists()


@pytest.mark.parametrize("damage", [b"", b"\xff", b"0" * 32 + b" " + b"0" * 32])
def test_a_damaged_entry_is_made_again(base, damage):
    before = base_fingerprint(base)
    (entry,) = cache_folder("bases").iterdir()
    content = entry.read_bytes()
    entry.write_bytes(damage)

    assert base_fingerprint(base) == before
    assert entry.read_bytes() == content


def test_loading_does_not_wait(base, monkeypatch):
    trained_on = open_base(base).identity
    flip(weights(base)[0], weights(base)[0].stat().st_size - 1)
    may_hash, hashes = threading.Event(), base_content._tensor_hashes
    monkeypatch.setattr(
        base_content, "_tensor_hashes", lambda file: may_hash.wait(60) and hashes(file)
    )
    opened = open_base(base)
    opened.require_trained_on("run", trained_on, "give that base", later=True)
    load_base_params(opened.folder, opened.config, "float32")
    assert not opened.content.is_hashed
    other = BaseIdentity("other", "0:0")
    with pytest.raises(CheckpointError, match="base other"):  # samples do not wait
        opened.require_trained_on("run", other, "give that base", later=True)
    may_hash.set()

    with pytest.raises(CheckpointError, match="run: was trained on the base"):
        opened.require_expected()


def test_a_file_that_changes_while_it_is_read(base, monkeypatch):
    hashes = base_content._tensor_hashes

    def change(file):
        result = hashes(file)
        flip(file, file.stat().st_size - 1)
        return result

    monkeypatch.setattr(base_content, "_tensor_hashes", change)
    with pytest.raises(CheckpointError, match="changed while they were read"):
        base_fingerprint(base)


def test_a_disk_that_fails(base, monkeypatch):
    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(base_content, "_tensor_hashes", fail)
    with pytest.raises(CheckpointError, match=r"base: cannot be read \(Input/output error\)"):
        base_fingerprint(base)


def test_the_thread_ends_with_the_process(base, monkeypatch):
    """The interpreter waits for the thread, after the main thread has ended."""
    ended = threading.Thread(target=time.sleep, args=(0,))
    ended.start()
    ended.join()
    monkeypatch.setattr(threading, "main_thread", lambda: ended)

    with pytest.raises(CheckpointError, match="the process ends"):
        base_content._tensor_hashes(weights(base)[0])
