"""Files are read row by row, and messages name file and line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_jax.data.readers import read_rows
from moe_jax.errors import DataError


def rows_of(path):
    return [(where.rsplit(": ", 1)[1], row) for where, row in read_rows(Path(path))]


def test_json_list_counts_rows_from_one(write):
    path = write("a.json", ' \n[{"x": "1"},\n {"x": null}]')
    assert rows_of(path) == [("row 1", {"x": "1"}), ("row 2", {"x": None})]


def test_json_lines_keep_line_numbers_over_blank_lines_and_any_ending(write):
    content = '\ufeff{"x": "1"}\n\n{"x": "\u2028"}\r\n'
    expected = [("line 1", {"x": "1"}), ("line 3", {"x": "\u2028"})]
    assert rows_of(write("a.jsonl", content)) == expected
    assert rows_of(write("a.json", content)) == expected


def test_text_is_divided_at_blank_lines_and_keeps_other_line_breaks(write):
    path = write("a.txt", "\n\none\n  two\n \n\nthree\r\n")
    assert rows_of(path) == [("line 3", {"text": "one\n  two"}), ("line 7", {"text": "three"})]


def test_parquet_rows_and_nested_columns(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"m": [{"role": "user", "n": i}]} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    assert rows_of(path) == [(f"row {i + 1}", row) for i, row in enumerate(rows)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
def test_empty_file_has_no_rows(write, name):
    assert rows_of(write(name, "")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"x": 1}\n{"x": \n', "a.jsonl: line 2: not valid JSON"),
        ("a.json", '[{"x": 1},\n{"x" 2}]', "a.json: line 2: not valid JSON"),
        ("a.json", '{\n "x": 1\n}', "a.json: line 1: not valid JSON"),
        ("a.jsonl", b'{"x": "1"}\n{"x": "\xff"}\n', "a.jsonl: line 2: byte 8 is not UTF-8"),
        ("a.json", b'[{"x": "\xff"}]', "a.json: byte 8 is not UTF-8"),
        ("a.txt", b"fine\n\xff\n", "a.txt: line 2: byte 1 is not UTF-8"),
        ("a.parquet", b"no parquet at all", "a.parquet: not a readable Parquet file after row 0"),
        ("a.parquet", b"", "a.parquet: not a readable Parquet file after row 0"),
    ],
)
def test_damage_is_named_by_file_and_line(write, name, content, message):
    with pytest.raises(DataError) as caught:
        rows_of(write(name, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt: cannot be read"):
        rows_of(tmp_path / "folder.txt")
