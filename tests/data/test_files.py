"""Files of folders, patterns and folders of `save_to_disk`, and what is skipped."""

import os
from pathlib import Path

import datasets
import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.data.files import file_kind, find_files, folder_files, skipped_text
from moe_jax.data.sources import read_source
from moe_jax.errors import DataError


@pytest.fixture
def make(tmp_path):
    """Creates empty files below `d` and returns that folder."""

    def make_files(*names):
        for name in names:
            (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "d" / name).touch()
        return tmp_path / "d"

    return make_files


def names(folder, found):
    return [file.relative_to(folder).as_posix() for file in found.files]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.b.CSV", ".csv"),
        ("a.json.gz", ".json"),
        ("a.v1.TXT.zst", ".txt"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.jsonl.zip", None),
        ("jsonl", None),
        (".jsonl", None),
    ],
)
def test_kinds_by_name(name, kind):
    assert file_kind(Path("some.csv") / name) == kind


def test_hidden_system_and_metadata_files_are_no_data(make):
    folder = make(
        "train.jsonl",
        "sub/more.csv.gz",
        ".ipynb_checkpoints/train-checkpoint.jsonl",
        "sub/.ipynb_checkpoints/more.csv",
        "__MACOSX/._train.jsonl",
        "._train.jsonl",
        "sub/.DS_Store",
        "Thumbs.db",
        "_SUCCESS",
        ".git/objects/a.json",
        ".git/objects/b.json",
        "README.md",
        "LICENSE",
        "licence.txt",
        "dataset_infos.json",
        "notes.md",
        "images/a.png",
    )
    found = folder_files(folder)
    assert names(folder, found) == ["sub/more.csv.gz", "train.jsonl"]
    assert found.skipped == {
        "hidden": [
            "._train.jsonl",
            ".git/",
            ".ipynb_checkpoints/",
            "Thumbs.db",
            "_SUCCESS",
            "__MACOSX/",
            "sub/.DS_Store",
            "sub/.ipynb_checkpoints/",
        ],
        "metadata": ["LICENSE", "README.md", "dataset_infos.json", "licence.txt"],
        "unknown kind": ["images/a.png", "notes.md"],
    }
    assert skipped_text(found.skipped) == (
        "14 (hidden: ._train.jsonl and 7 more; metadata: LICENSE and 3 more; "
        "unknown kind: images/a.png and 1 more)"
    )


def test_parents_of_a_folder_may_be_hidden(make):
    folder = make(".cache/x/a.jsonl") / ".cache" / "x"
    assert names(folder, find_files([str(folder)], "train")) == ["a.jsonl"]
    assert find_files([str(folder / "*.jsonl")], "train").files == (folder / "a.jsonl",)
    assert find_files([str(folder / "a.jsonl")], "train").files == (folder / "a.jsonl",)


def test_linked_folders_are_read_once(make):
    folder = make("a/x.jsonl")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "y.jsonl").touch()
    (folder / "b").symlink_to(outside)
    (folder / "a" / "back").symlink_to(folder)
    found = folder_files(folder)
    assert names(folder, found) == ["a/x.jsonl", "b/y.jsonl"]
    assert found.skipped == {"linked twice": ["a/back/"]}


def test_links_to_nothing_are_refused(make):
    folder = make("a.jsonl")
    (folder / "b.jsonl").symlink_to("../objects/b")
    for path in (str(folder), str(folder / "*.jsonl")):
        with pytest.raises(DataError, match=r"b\.jsonl: is a link to \.\./objects/b, which does"):
            find_files([path], "train")


def test_pipes_are_skipped_by_name(make):
    folder = make("a.jsonl")
    os.mkfifo(folder / "b.jsonl")
    assert find_files([str(folder)], "train").skipped == {"no regular file": ["b.jsonl"]}
    path = str(folder / "*.jsonl")
    skipped = find_files([path], "train").skipped
    assert skipped == {"no regular file": [str(folder / "b.jsonl")]}


def test_other_splits_are_named(make):
    folder = make("train.jsonl", "val.jsonl", "test.jsonl", "notes.md")
    found = find_files([str(folder)], "train")
    assert names(folder, found) == ["train.jsonl"]
    assert found.skipped == {
        "not named after the split": ["test.jsonl", "val.jsonl"],
        "unknown kind": ["notes.md"],
    }
    snapshot = make("s/data/train-00000-of-00002.parquet", "s/data/train-00001-of-00002.parquet")
    assert len(find_files([str(snapshot / "s")], "train").files) == 2


def test_patterns(make, tmp_path, monkeypatch):
    folder = make("part1.json", "part2.json", "part3.xml", "other.json", ".part4.json")
    make("a/part5.json", "a/b/part6.json", "__MACOSX/part7.json", "[x]/part8.json")
    found = find_files([str(folder / "part*")], "train")
    assert names(folder, found) == ["part1.json", "part2.json"]
    assert found.skipped == {"unknown kind": [str(folder / "part3.xml")]}
    assert names(folder, find_files([f"{folder}/[a-o]*/**/*.json"], "train")) == [
        "a/b/part6.json",
        "a/part5.json",
    ]
    found = find_files([f"{folder}/**/part[5-7].json"], "train")
    assert names(folder, found) == ["a/b/part6.json", "a/part5.json"]
    assert found.skipped == {"hidden": [str(folder / "__MACOSX/part7.json")]}
    assert names(folder, find_files([f"{folder}/[x]"], "train")) == ["[x]/part8.json"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(folder, find_files(["~/d/part1.*", "~/d/part[12].json"], "train")) == [
        "part1.json",
        "part2.json",
    ]


@pytest.mark.parametrize(
    ("pattern", "split", "message"),
    [
        ("no*.json", "train", r"no\*\.json: no data file matches this pattern$"),
        ("*.xml", "train", r"no data file matches this pattern; it matches only 1 \(unknown kind"),
        ("*.json", "test", "a pattern of files has no split 'test'; leave it at 'train'"),
    ],
)
def test_patterns_without_data(make, pattern, split, message):
    folder = make("a.json", "b.xml")
    with pytest.raises(DataError, match=message):
        find_files([f"{folder}/{pattern}"], split)


ROWS = [{"prompt": f"p{i}", "completion": str(i)} for i in range(4)]


def prompts(folder, tmp_path, **fields):
    source = SourceConfig(path=str(folder), **fields)
    return list(read_source(source, str(tmp_path / "cache")).rows["prompt"])


def test_a_data_set_on_disk(tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder, num_shards=2)
    loaded = datasets.load_from_disk(str(folder))
    # `map` writes its cache beside the data.
    loaded.map(lambda row: {"prompt": row["prompt"] + "!"}, load_from_cache_file=False)
    assert list(folder.glob("cache-*.arrow"))
    assert prompts(folder, tmp_path) == ["p0", "p1", "p2", "p3"]
    assert prompts(folder, tmp_path, split="train[1:2]") == ["p1"]
    skipped = find_files([str(folder)], "train").skipped
    assert skipped["metadata"] == ["dataset_info.json", "state.json"]
    assert len(skipped["not in state.json"]) == 1
    with pytest.raises(DataError, match="is one data set of `save_to_disk`, without a split 'dev'"):
        prompts(folder, tmp_path, split="dev")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        DataError, match=r"saved: lacks data-00001-of-00002\.arrow, which its state"
    ):
        prompts(folder, tmp_path)


def test_a_data_set_on_disk_with_splits(tmp_path):
    folder = tmp_path / "saved"
    parts = {"train_sft": ROWS[:3], "train": ROWS[1:2], "dev": ROWS[3:]}
    splits = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    assert prompts(folder, tmp_path) == ["p1"]
    assert prompts(folder, tmp_path, split="train_sft[:2]") == ["p0", "p1"]
    assert prompts(folder, tmp_path, split="dev") == ["p3"]
    with pytest.raises(DataError, match="no split 'test'; splits: train_sft, train, dev"):
        prompts(folder, tmp_path, split="test")
    assert find_files([str(folder)], "train").skipped["other splits"] == ["train_sft/", "dev/"]
    (folder / "dataset_dict.json").write_text("[]")
    with pytest.raises(DataError, match=r"dataset_dict\.json: lists no splits"):
        prompts(folder, tmp_path)
