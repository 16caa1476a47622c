"""A folder that is written whole or not at all, and the space it needs."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from moe_jax.errors import CheckpointError
from moe_jax.files.disk import require_space
from moe_jax.files.new_folder import new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target, 10) as folder:
        (folder / "a").write_text("x")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["out"]


def test_an_empty_folder_is_taken_and_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.incomplete" / "old").mkdir(parents=True)
    with new_folder(tmp_path / "out", 10) as folder:
        (folder / "a").write_text("x")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (RuntimeError("a defect"), RuntimeError, "a defect"),
        (OSError(errno.ENOSPC, "full"), CheckpointError, "no space left on the disk; free some"),
    ],
)
def test_a_failure_leaves_nothing(tmp_path, error, raised, words):
    def fail(folder):
        (folder / "a").write_text("x")
        raise error

    with pytest.raises(raised, match=words), new_folder(tmp_path / "out", 10) as folder:
        fail(folder)
    assert names(tmp_path) == []


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="out: is not empty, and nothing in it is overwr"):
        with new_folder(tmp_path / "out", 10):
            pass
    with pytest.raises(CheckpointError, match="mine: is a file; give a folder"):
        with new_folder(tmp_path / "out" / "mine", 10):
            pass
    with pytest.raises(CheckpointError, match="not a directory; mend that"):
        with new_folder(tmp_path / "out" / "mine" / "deeper", 10):
            pass
    assert names(tmp_path / "out") == ["mine"]


def test_a_link_leads_to_where_it_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "link2").symlink_to("not_there_yet")
    for link in ("link", "link2"):
        with new_folder(tmp_path / link, 10) as folder:
            (folder / "a").write_text("x")
        assert names(tmp_path / link) == ["a"]
    assert names(tmp_path) == ["elsewhere", "link", "link2", "not_there_yet"]
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(CheckpointError, match=r"cannot write .*circle"):
        with new_folder(tmp_path / "circle", 10):
            pass


def test_a_mount_point_is_refused_before_and_not_when_all_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: is a mount point; give a new folder in it"):
        with new_folder(tmp_path / "out", 10):
            pass


def test_a_disk_that_is_too_small_is_found_before(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=2_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "not" / "there" / "yet", 2_000_000)
    assert asked == [tmp_path]
    with pytest.raises(CheckpointError, match=r"takes 2\.5 MB and the disk has 2\.0 MB; free"):
        with new_folder(tmp_path / "out", 2_500_000):
            pytest.fail("it was begun")
    assert names(tmp_path) == []
