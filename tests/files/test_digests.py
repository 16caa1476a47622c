"""Digests of folders: what they notice, and what they never open."""

import hashlib
import json

import pytest
from damage import FAULTS, flip

from moe_jax.errors import CheckpointError
from moe_jax.files.digests import content_digest, find_damage, read_digests, write_digests


@pytest.fixture
def folder(tmp_path):
    for name, content in (("a/one", b"1" * 100), ("a/b/two", b"2"), ("c", b"")):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    write_digests(tmp_path / "folder")
    return tmp_path / "folder"


def test_digests_are_sha256(folder):
    assert read_digests(folder) == {
        "a/b/two": hashlib.sha256(b"2").hexdigest(),
        "a/one": hashlib.sha256(b"1" * 100).hexdigest(),
        "c": hashlib.sha256(b"").hexdigest(),
    }
    assert find_damage(folder) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named(folder, fault):
    FAULTS[fault](folder / "a" / "one")
    problem = "is missing" if fault == "remove" else "differs from its digest"
    assert find_damage(folder) == f"a/one {problem}"
    assert find_damage(folder, ["a/"]) == f"a/one {problem}"
    assert find_damage(folder, ["a/b/", "c"]) is None


def test_every_bit_of_the_digests_counts(folder):
    file = folder / "digests.json"
    content = file.read_bytes()
    for place in range(len(content)):
        if content[place] not in b" \n":
            flip(file, place, place % 8)
            assert find_damage(folder, ["c"]) == "digests.json is damaged"
            file.write_bytes(content)
    file.unlink()
    assert find_damage(folder) == "digests.json is missing"
    file.mkdir()
    assert find_damage(folder) == "digests.json is damaged"


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"files": 3, "digest": 4}', "[" * 10**5, '{"files": {}}']
)
def test_digests_of_others(folder, content):
    (folder / "digests.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"digests\.json is damaged"):
        read_digests(folder)


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "a/../../outside", "device", "a"])
def test_files_elsewhere_are_not_opened(folder, name):
    (folder.parent / "outside").write_bytes(b"x")
    (folder / "device").symlink_to("/dev/zero")
    files = {name: hashlib.sha256(b"x").hexdigest()}
    content = {"files": files, "digest": content_digest(files)}
    (folder / "digests.json").write_text(json.dumps(content))
    assert find_damage(folder) == f"{name} is missing"


def test_links_to_files_and_folders_are_followed(folder):
    (folder / "c").rename(folder.parent / "c")
    (folder / "c").symlink_to(folder.parent / "c")
    (folder / "a").rename(folder.parent / "a")
    (folder / "a").symlink_to(folder.parent / "a")
    assert find_damage(folder) is None
    (folder.parent / "c").write_bytes(b"more")
    assert find_damage(folder) == "c differs from its digest"


def test_content_by_hand():
    text = '{"a": [1, 2.5, null], "b": {}}'
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert content_digest({"b": {}, "a": [1, 2.5, None]}) == expected
    assert content_digest({"b": {}, "a": [1, 2.50001, None]}) != expected
