"""Files and splits of a source, and messages about missing ones."""

import errno
import json

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.utils import filter_repo_objects

from moe_jax.config.data import SourceConfig
from moe_jax.data.sources import read_source
from moe_jax.errors import DataError


@pytest.fixture
def read(tmp_path):
    def read_texts(path, schema="text", **fields):
        source = SourceConfig(path=str(path), schema=schema, **fields)
        return read_source(source, str(tmp_path / "cache")).rows

    return read_texts


def texts(*names):
    return [{"text": name} for name in names]


def test_every_kind_of_file_gives_the_same_rows(write, tmp_path, read):
    rows = texts("one", "2020-01-01")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    paths = [
        write("a.json", rows),
        write("a.jsonl", rows),
        write("a.txt", "one\n\n2020-01-01\n"),
        tmp_path / "a.parquet",
    ]
    for path in paths:
        assert list(read(path)["text"]) == ["one", "2020-01-01"]


def test_rows_hold_their_file_and_line(write, read):
    rows = read(write("a.jsonl", texts("x", "y")))
    assert [where.rsplit("/")[-1] for where in rows["where"]] == [
        "a.jsonl: line 1",
        "a.jsonl: line 2",
    ]


def test_folder_without_named_splits_is_all_train(write, tmp_path, read):
    write("d/b.jsonl", texts("2"))
    write("d/a.json", texts("1"))
    write("d/sub/c.txt", "3\n\n4")
    write("d/README.md", "no data")
    assert list(read(tmp_path / "d")["text"]) == ["1", "2", "3", "4"]
    with pytest.raises(DataError, match="named after the split 'test'; splits found: none"):
        read(tmp_path / "d", split="test")


def test_folder_with_a_file_per_split(write, tmp_path, read):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "test/part1", "retrained"):
        write(f"d/{name}.jsonl", texts(name))
    assert list(read(tmp_path / "d")["text"]) == ["train-00000-of-00002", "train-00001-of-00002"]
    assert list(read(tmp_path / "d", split="validation")["text"]) == ["dev"]
    assert list(read(tmp_path / "d", split="test")["text"]) == ["test/part1"]
    with pytest.raises(DataError, match="'extra'; splits found: train, validation, test"):
        read(tmp_path / "d", split="extra")


def test_parts_of_a_split_do_not_overlap(write, read):
    path = write("a.jsonl", texts(*"abcdefghij"))
    assert list(read(path, split="train[:70%]")["text"]) == list("abcdefg")
    assert list(read(path, split="train[70%:]")["text"]) == list("hij")
    assert list(read(path, split="train[2:4]")["text"]) == list("cd")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[2:2]", "the split 'train[2:2]' holds no rows"),
        ("train[x]", "cannot take the split 'train[x]' of 3 rows"),
        ("test", "a.jsonl: a single file has no split 'test'"),
    ],
)
def test_splits_that_a_file_does_not_have(write, read, split, message):
    with pytest.raises(DataError) as caught:
        read(write("a.jsonl", texts(*"abc")), split=split)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such", "./gone", "~/gone", "gone.jsonl", "a/b/c"])
def test_missing_file_is_not_requested_from_the_hub(monkeypatch, read, path):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(DataError, match=r"^[^ ]*: no such file or folder$"):
        read(path)


def test_empty_sources_are_refused(write, tmp_path, read):
    with pytest.raises(DataError, match=r"a\.xml: unknown kind of file; known: \.json,"):
        read(write("a.xml", "x"))
    with pytest.raises(DataError, match=r"holds no \.json.* file; it holds 1 \(unknown kind: a\.x"):
        read(tmp_path)
    empty = [("a.jsonl", "\n"), ("a.json", "[]"), ("a.txt", " \n"), ("a.csv", "text\n")]
    for name, content in empty:
        with pytest.raises(DataError, match=rf"{name}: holds no rows"):
            read(write(name, content))


def test_bad_row_is_named_through_the_cache_builder(write, read):
    path = write("a.jsonl", [{"text": "x"}, {"txt": "y"}])
    with pytest.raises(DataError, match=r"a.jsonl: line 2: no column 'text' \(it has: txt\)"):
        read(path)
    write("a.jsonl", texts("x", "y"))
    assert list(read(path)["text"]) == ["x", "y"]


def test_rows_follow_the_file_and_the_columns(write, read):
    path = write("a.jsonl", [{"text": "x", "other": "y"}])
    assert read(path)["text"][0] == "x"
    assert read(path, columns={"text": "other"})["text"][0] == "y"
    write("a.jsonl", [{"text": "z", "other": "y"}])
    assert read(path)["text"][0] == "z"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The real `datasets.load_dataset`, with a folder in place of the id `someone/things`."""
    load = datasets.load_dataset
    asked = {}

    def load_from_folder(path, **arguments):
        asked.update(path=path, **arguments)
        return load(str(tmp_path / "hub"), **{**arguments, "name": None, "revision": None})

    monkeypatch.setattr(datasets, "load_dataset", load_from_folder)
    return asked


def test_hub_data_set_is_read_and_checked(write, hub, read):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write("hub/train.jsonl", [{"chat": messages, "id": 1}, {"chat": messages, "id": 2}])
    fields = {"name": "all", "revision": "abc", "columns": {"messages": "chat"}}
    rows = read("someone/things", schema="chat", split="train[:1]", **fields)
    assert json.loads(rows[0]["messages"]) == messages
    assert rows["where"][:] == ["someone/things, train[:1]: row 1"]
    assert (hub["path"], hub["name"], hub["revision"]) == ("someone/things", "all", "abc")
    with pytest.raises(DataError, match="someone/things, train: row 1: no column 'messages'"):
        read("someone/things", schema="chat")


@pytest.mark.parametrize(
    ("path", "fields", "revision"),
    [
        ("someone/things", {}, None),
        ("hf://datasets/someone/things", {"revision": "v1"}, "v1"),
        ("hf://datasets/someone/things@v1", {"name": "all"}, "v1"),
        ("hf://datasets/someone/things@refs/pr/1", {"revision": "refs/pr/1"}, "refs/pr/1"),
    ],
)
def test_addresses_of_hub_data_sets(write, hub, read, path, fields, revision):
    write("hub/train.jsonl", texts("x"))
    assert list(read(path, None, **fields)["text"]) == ["x"]
    asked = {key: hub[key] for key in ("path", "name", "split", "revision")}
    name = fields.get("name")
    assert asked == {"path": "someone/things", "name": name, "split": "train", "revision": revision}


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """Files in place of the hub's repository `someone/things`, and the calls for them.

    As on the hub, only the files that the call allows are there.
    """
    files = {
        "README.md": "",
        "data/train-00000-of-00002.jsonl": '{"text": "a"}',
        "data/train-00001-of-00002.jsonl": '{"text": "b"}',
        "data/test.jsonl": '{"text": "c"}',
        "en/deep/x.csv": "text\nd\n",
        "en/x.csv": "text\ne\n",
    }
    calls = []

    def download(repo_id, **arguments):
        folder = tmp_path / f"snapshot [{len(calls)}]"
        calls.append((repo_id, arguments["repo_type"], arguments["revision"]))
        allowed = filter_repo_objects(files, allow_patterns=arguments["allow_patterns"])
        for name in allowed:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(files[name])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        ("data", {}, "ab"),
        ("data", {"split": "test"}, "c"),
        ("data/test.jsonl", {}, "c"),
        ("data/*.jsonl", {}, "cab"),
        ("**/*.csv", {}, "de"),
        ("en/**/x.csv", {}, "de"),
        ("en", {"name": "deep"}, "d"),
    ],
)
def test_files_of_a_hub_repository(repository, read, path, fields, expected):
    rows = read(f"hf://datasets/someone/things@v2/{path}", **fields)
    assert list(rows["text"]) == list(expected)
    assert set(repository) == {("someone/things", "dataset", "v2")}


def test_hub_files_that_cannot_be_read(monkeypatch, repository, read):
    with pytest.raises(DataError, match=r"^hf://datasets/a/b/data/x\.csv: the repository has no "):
        read("hf://datasets/a/b/data/x.csv")
    with pytest.raises(DataError, match="no data file matches this pattern"):
        read("hf://datasets/a/b/data/*.csv")
    with pytest.raises(DataError, match="has a revision, and `revision` is 'v1'; give one"):
        read("hf://datasets/a/b@v2/data", revision="v1")
    for address in ("hf://datasets/b", "hf://a/b", "hf://datasets/a/b@"):
        with pytest.raises(DataError, match="write hf://datasets/OWNER/NAME"):
            read(address)
    monkeypatch.undo()  # the library's own answer without a network
    with pytest.raises(DataError, match=r"/data: cannot be read from the hub \(") as caught:
        read("hf://datasets/a/b/data")
    assert "\n" not in str(caught.value)


def test_several_paths_are_one_data_set(write, tmp_path, read, repository):
    first, second = write("one.jsonl", texts("1")), write("d/two.csv", "text\n2\n")
    paths = (second, first, str(tmp_path / "d"), "hf://datasets/someone/things/data/test.jsonl")
    source = SourceConfig(path=paths, schema="text")
    table = read_source(source, str(tmp_path / "cache"))
    assert list(table.rows["text"]) == ["2", "1", "c"]
    assert (table.files, dict(table.skipped)) == (3, {"named twice": [second]})
    message = r"^owner/set: is no file, folder or pattern, as several paths must be"
    with pytest.raises(DataError, match=message):
        read_source(SourceConfig(path=(first, "owner/set"), schema="text"), None)


def test_settings_of_the_hub_are_refused_for_local_files(write, tmp_path, read):
    path = write("d/sub/a.jsonl", texts("x"))
    assert list(read(tmp_path / "d", name="sub")["text"]) == ["x"]
    with pytest.raises(DataError, match=r"d: has no subfolder 'other', which `name` selects"):
        read(tmp_path / "d", name="other")
    with pytest.raises(DataError, match=r"a\.jsonl: is local, so it has no revision"):
        read(path, revision="main")


def test_hub_rows_follow_the_content_and_the_split(write, hub, read):
    for content in ("ab", "cd"):
        write("hub/train.jsonl", texts(*content))
        for _ in range(2):
            assert list(read("someone/things")["text"]) == list(content)
            assert list(read("someone/things", split="train[1:]")["text"]) == [content[1]]


def test_hub_errors_are_one_line(write, hub, read):
    write("hub/train.jsonl", texts("x"))
    with pytest.raises(DataError, match=r"not readable as a hub data set .*test") as caught:
        read("someone/things", split="test")
    assert "\n" not in str(caught.value)


def test_cache_that_cannot_be_written(write):
    source, file = SourceConfig(path=write("a.jsonl", texts("x")), schema="text"), write("f", "x")
    with pytest.raises(DataError) as error:
        read_source(source, file)
    assert str(error.value) == (
        f"cannot keep the tokenized data in {file}: not a directory; move that file away, or set "
        "data.cache_dir to another one"
    )


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "permission denied; make that folder writable, or set data.cache_dir"),
        (errno.ENOSPC, "no space left on device; free some space there, or set data.cache_dir"),
    ],
)
def test_the_cache_of_the_user_that_cannot_be_written(write, monkeypatch, number, words):
    def fail(*_, **__):
        raise OSError(number, "in words of its own")

    monkeypatch.setattr(datasets.Dataset, "from_generator", fail)
    source = SourceConfig(path=write("a.jsonl", texts("x")), schema="text")
    with pytest.raises(DataError) as error:
        read_source(source, None)
    assert str(error.value) == (
        f"cannot keep the tokenized data in {HF_DATASETS_CACHE}: {words}, or "
        "the environment's HF_DATASETS_CACHE, to another one"
    )


def test_progress_bars_stay_as_the_user_set_them(write, read):
    datasets.enable_progress_bars()
    read(write("a.jsonl", texts("x")))
    assert not datasets.are_progress_bars_disabled()
