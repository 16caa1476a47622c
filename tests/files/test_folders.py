"""Folders that are written whole or not at all, the space they need, and their replacement."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_jax.errors import CheckpointError
from moe_jax.files.disk import require_space
from moe_jax.files.folders import (
    current_folder,
    new_folder,
    replace_folder,
    restore_former_folder,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_appears_when_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target, 10) as folder:
        (folder / "a").write_text("x")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["out"]


def test_new_folder_replaces_an_empty_folder_and_removes_leftovers(tmp_path):
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
def test_new_folder_is_removed_on_failure(tmp_path, error, raised, words):
    def fail(folder):
        (folder / "a").write_text("x")
        raise error

    with pytest.raises(raised, match=words), new_folder(tmp_path / "out", 10) as folder:
        fail(folder)
    assert names(tmp_path) == []


def test_new_folder_refuses_existing_content(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="out: is not empty, and nothing in it is overwr"):
        with new_folder(tmp_path / "out", 10):
            pass
    with pytest.raises(CheckpointError, match="mine: is a file; give a folder"):
        with new_folder(tmp_path / "out" / "mine", 10):
            pass
    with pytest.raises(CheckpointError, match="not a directory; fix that"):
        with new_folder(tmp_path / "out" / "mine" / "deeper", 10):
            pass
    assert names(tmp_path / "out") == ["mine"]


def test_new_folder_follows_links(tmp_path):
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


def test_new_folder_refuses_a_mount_point_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(CheckpointError, match="out: is a mount point; give a new folder in it"):
        with new_folder(tmp_path / "out", 10):
            pass


def test_new_folder_refuses_a_small_disk_before_writing(tmp_path, monkeypatch):
    paths = []

    def usage(path):
        paths.append(path)
        return SimpleNamespace(free=2_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "not" / "there" / "yet", 2_000_000)
    assert paths == [tmp_path]
    with pytest.raises(CheckpointError, match=r"takes 2\.5 MB and the disk has 2\.0 MB; free"):
        with new_folder(tmp_path / "out", 2_500_000):
            pytest.fail("writing started")
    assert names(tmp_path) == []


class Killed(BaseException):
    """Exception that replaces a signal that ends the process at once."""


def folder_of(text, folder):
    folder.mkdir(parents=True)
    (folder / "text").write_text(text)
    return folder


def text_in(folder):
    return (current_folder(folder) / "text").read_text()


def killed_before(operation, folder, monkeypatch):
    """Replaces `folder` and raises `Killed` before the given rename or removal."""
    done = iter(range(100))

    def watched(original):
        def step(*arguments, **more):
            if next(done) >= operation:
                raise Killed
            return original(*arguments, **more)

        return step

    complete = folder_of("new", folder.with_name(f".{folder.name}.incomplete"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", watched(Path.rename))
        patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
        with pytest.raises(Killed):
            replace_folder(folder, complete)


# Operations in order: remove leftovers, rename the former folder, rename the new one, rename the
# former one again, remove it.
@pytest.mark.parametrize(("operation", "found"), [(0, "old"), (1, "old"), (2, "old"), (3, "new")])
def test_a_kill_at_any_moment_leaves_the_former_or_the_new_folder(
    operation, found, tmp_path, monkeypatch
):
    folder = folder_of("old", tmp_path / "best" / "a")
    killed_before(operation, folder, monkeypatch)
    assert folder.exists() == (operation != 2), "missing between the two renames"
    before = names(folder.parent)
    assert text_in(folder) == found
    assert names(folder.parent) == before, "reading changes nothing"

    shutil.rmtree(folder.with_name(".a.incomplete"), ignore_errors=True)
    replace_folder(folder, folder_of("newer", folder.with_name(".a.incomplete")))
    assert text_in(folder) == "newer"
    assert names(folder.parent) == ["a"]


def test_a_folder_under_removal_is_not_taken_for_the_former_one(tmp_path, monkeypatch):
    folder = folder_of("old", tmp_path / "a")
    killed_before(4, folder, monkeypatch)
    assert names(tmp_path) == [".a.incomplete", "a"]
    shutil.rmtree(folder)
    assert current_folder(folder) == folder


def test_a_second_kill_keeps_the_former_folder(tmp_path, monkeypatch):
    folder = folder_of("old", tmp_path / "a")
    for operation in (2, 0):
        killed_before(operation, folder, monkeypatch)
        assert text_in(folder) == "old"
        shutil.rmtree(tmp_path / ".a.incomplete")


def test_a_failed_rename_restores_the_former_folder(tmp_path, monkeypatch):
    folder = folder_of("old", tmp_path / "a")
    complete, rename = folder_of("new", tmp_path / ".a.incomplete"), Path.rename

    def fail(path, target):
        if path == complete:
            raise OSError(errno.ENOSPC, "full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="full"):
        replace_folder(folder, complete)
    assert (folder / "text").read_text() == "old"


def test_replacement_behind_a_link(tmp_path, monkeypatch):
    target = folder_of("old", tmp_path / "elsewhere" / "a")
    (tmp_path / "link").symlink_to(target)
    killed_before(2, target, monkeypatch)
    assert text_in(tmp_path / "link") == "old"
    restore_former_folder(tmp_path / "link")
    assert names(target.parent) == [".a.incomplete", "a"]
    assert (tmp_path / "link" / "text").read_text() == "old"


def test_a_missing_folder(tmp_path):
    assert current_folder(tmp_path / "a") == tmp_path / "a"
    replace_folder(tmp_path / "a", folder_of("new", tmp_path / ".a.incomplete"))
    assert text_in(tmp_path / "a") == "new"


def test_a_replaced_folder_does_not_come_back(tmp_path):
    # Killed between the second rename and the removal of the former folder.
    folder, former = tmp_path / "a", tmp_path / ".a.former"
    for place in (folder, former):
        place.mkdir()
    restore_former_folder(folder)
    folder.rmdir()
    assert current_folder(folder) == folder
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_removal_are_removed(tmp_path):
    folder, half = folder_of("old", tmp_path / "a"), tmp_path / ".a.stale"
    folder_of("older", tmp_path / ".a.former")
    folder_of("half of the oldest", half)
    restore_former_folder(folder)
    assert names(tmp_path) == ["a"]
    assert text_in(folder) == "old"
    folder_of("half of the oldest", half)
    replace_folder(folder, folder_of("new", tmp_path / ".a.incomplete"))
    assert names(tmp_path) == ["a"]
    assert text_in(folder) == "new"
