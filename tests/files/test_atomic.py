"""Files that are replaced in one step."""

import errno
import os

import pytest

from moe_jax.errors import CheckpointError
from moe_jax.files.atomic import write_atomic


@pytest.mark.parametrize("content", ["äöü\n", b"\x00\xff"])
def test_the_file_is_replaced(content, tmp_path):
    file = tmp_path / "a.json"
    file.write_text("former")
    write_atomic(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_keeps_the_former_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("former")

    def fail(source, target):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", fail)
    message = rf"^cannot write {file}: no space left .* again \(the former one is kept\)$"
    with pytest.raises(CheckpointError, match=message):
        write_atomic(file, "new", "the former one is kept")
    assert file.read_text() == "former"
    assert list(tmp_path.iterdir()) == [file]
