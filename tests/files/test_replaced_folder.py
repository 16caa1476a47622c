"""Whoever reads a folder that was being replaced finds the former one or the new one."""

import errno
import shutil
from pathlib import Path

import pytest

from moe_jax.files.replaced_folder import present_folder, put_back, replace_folder


class Killed(BaseException):
    """Stands for a signal that leaves no time for anything."""


def folder_of(text, folder):
    folder.mkdir(parents=True)
    (folder / "text").write_text(text)
    return folder


def text_in(folder):
    return (present_folder(folder) / "text").read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed_before(operation, folder, monkeypatch):
    """Replaces `folder`, and stops for good before the given rename or removal."""
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


# Removing what is left of an earlier time, the former one aside, the new one in, the former one's
# name, removing it.
@pytest.mark.parametrize(("operation", "found"), [(0, "old"), (1, "old"), (2, "old"), (3, "new")])
def test_a_kill_at_any_moment_leaves_one_of_the_two(operation, found, tmp_path, monkeypatch):
    folder = folder_of("old", tmp_path / "best" / "a")
    killed_before(operation, folder, monkeypatch)
    assert folder.exists() == (operation != 2), "between the two renames it is not in its place"
    before = names(folder.parent)
    assert text_in(folder) == found
    assert names(folder.parent) == before, "reading changes nothing"

    shutil.rmtree(folder.with_name(".a.incomplete"), ignore_errors=True)
    replace_folder(folder, folder_of("newer", folder.with_name(".a.incomplete")))
    assert text_in(folder) == "newer"
    assert names(folder.parent) == ["a"]


def test_what_is_being_removed_is_not_taken_for_the_former_one(tmp_path, monkeypatch):
    folder = folder_of("old", tmp_path / "a")
    killed_before(4, folder, monkeypatch)
    assert names(tmp_path) == [".a.incomplete", "a"]
    shutil.rmtree(folder)
    assert present_folder(folder) == folder


def test_a_second_kill_costs_nothing_either(tmp_path, monkeypatch):
    folder = folder_of("old", tmp_path / "a")
    for operation in (2, 0):
        killed_before(operation, folder, monkeypatch)
        assert text_in(folder) == "old"
        shutil.rmtree(tmp_path / ".a.incomplete")


def test_a_failure_puts_the_former_one_back(tmp_path, monkeypatch):
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


def test_behind_a_link(tmp_path, monkeypatch):
    target = folder_of("old", tmp_path / "elsewhere" / "a")
    (tmp_path / "link").symlink_to(target)
    killed_before(2, target, monkeypatch)
    assert text_in(tmp_path / "link") == "old"
    put_back(tmp_path / "link")
    assert names(target.parent) == [".a.incomplete", "a"]
    assert (tmp_path / "link" / "text").read_text() == "old"


def test_nothing_there_is_nothing_found(tmp_path):
    assert present_folder(tmp_path / "a") == tmp_path / "a"
    replace_folder(tmp_path / "a", folder_of("new", tmp_path / ".a.incomplete"))
    assert text_in(tmp_path / "a") == "new"


def test_what_was_replaced_does_not_come_back(tmp_path):
    # Killed between the second rename and the removal of the former folder.
    folder, former = tmp_path / "a", tmp_path / ".a.former"
    for place in (folder, former):
        place.mkdir()
    put_back(folder)
    folder.rmdir()
    assert present_folder(folder) == folder
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_of_the_stale_folder_is_in_nobodys_way(tmp_path):
    folder, half = folder_of("old", tmp_path / "a"), tmp_path / ".a.stale"
    folder_of("older", tmp_path / ".a.former")
    folder_of("half of the oldest", half)
    put_back(folder)
    assert names(tmp_path) == ["a"]
    assert text_in(folder) == "old"
    folder_of("half of the oldest", half)
    replace_folder(folder, folder_of("new", tmp_path / ".a.incomplete"))
    assert names(tmp_path) == ["a"]
    assert text_in(folder) == "new"
