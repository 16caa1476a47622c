"""Cached tables are what was written: damage is seen and mended, and a table is made once."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
from damage import FAULTS, files_below

from moe_jax.data.table_cache import cached_table
from moe_jax.errors import DataError

LETTERS = [("a b", "c d e"), ("f", "g")]
ENCODED = [([1, 3, 4, 5, 6, 7, 2], [5, 6, 7, 2]), ([1, 8, 9, 2], [9, 2])]  # by the vocabulary


@pytest.fixture
def cache(run, completions, tmp_path):
    """The cache with the rows and the tokens of one data set; and how to read it again."""
    source = completions(LETTERS)
    assert run(source)[0] == ENCODED
    return tmp_path / "cache" / "moe_jax", lambda: run(source)[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_damaged_file_is_mended_and_named(cache, capsys, fault):
    folder, read = cache
    intact = {file: file.read_bytes() for file in files_below(folder) if file.stat().st_size}
    assert [file.name for file in intact] == ["00000.arrow", "digests.json"] * 2
    for file in intact:
        FAULTS[fault](file)
        assert read() == ENCODED
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{file.parent}: {file.name} ")
        assert line.endswith("; the table is made again")
        assert file.exists()
    assert read() == ENCODED
    assert capsys.readouterr().err == ""


def test_every_byte_of_the_tokens_counts(cache, capsys):
    folder, read = cache
    file = max(files_below(folder, "*.arrow"), key=lambda file: file.stat().st_size)
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 25):
        flipped = bytearray(content)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        assert read() == ENCODED
        assert "differs from its digest; the table is made again" in capsys.readouterr().err


def test_what_a_killed_process_left_is_no_entry(cache, capsys):
    folder, read = cache
    for entry in [path for path in folder.iterdir() if path.is_dir()]:
        incomplete = folder / f".{entry.name}.incomplete"
        (incomplete / "made").mkdir(parents=True)
        (incomplete / "made" / "tokens.arrow").write_bytes(b"half")
        shutil.rmtree(entry)
    assert read() == ENCODED
    assert capsys.readouterr().err == ""
    assert not list(folder.glob(".*"))


def test_two_readers_make_one_table(tmp_path):
    made, entered = [], threading.Barrier(2)

    def make(folder):
        made.append(folder)
        threading.Event().wait(0.2)  # the other one has found no table by now
        rows = {"row": list(range(5))}
        return datasets.Dataset.from_dict(rows).map(cache_file_name=str(folder / "t.arrow"))

    def read():
        entered.wait()
        return list(cached_table(str(tmp_path), "key", make)["row"])

    with ThreadPoolExecutor(2) as threads:
        tables = [future.result() for future in [threads.submit(read) for _ in range(2)]]
    assert tables == [list(range(5))] * 2
    assert len(made) == 1


def test_a_table_that_cannot_be_made_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half.arrow").write_bytes(b"half")
        raise DataError("row 2 does not fit")

    with pytest.raises(DataError, match="row 2 does not fit"):
        cached_table(str(tmp_path), "key", fail)
    assert [file.name for file in (tmp_path / "moe_jax").iterdir()] == ["key.lock"]


def test_an_intact_table_is_opened_without_a_lock(cache):
    folder, read = cache
    for file in folder.glob("*.lock"):
        file.unlink()
    assert read() == ENCODED
    assert not list(folder.glob("*.lock"))
