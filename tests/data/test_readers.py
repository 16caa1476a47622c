"""Files are read row by row, and messages name file and line."""

import bz2
import csv
import gzip
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from moe_jax.data.files import KINDS
from moe_jax.data.readers import READERS, read_rows
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


def test_tables_are_read_as_text(write):
    """A byte order mark, quoted delimiters, quotes and line breaks, and cells of any length."""
    long = "l" * 200_000
    content = f'\ufeffname, note\r\n1,"a, ""b""\nc"\r\n\r\n,{long}\r\n2020-01-01,nan\r\n'
    limit = csv.field_size_limit()
    assert rows_of(write("a.csv", content)) == [
        ("line 2", {"name": "1", "note": 'a, "b"\nc'}),
        ("line 5", {"name": "", "note": long}),
        ("line 6", {"name": "2020-01-01", "note": "nan"}),
    ]
    assert csv.field_size_limit() == limit
    assert rows_of(write("a.tsv", 'x\ty\na,b\t"c\td"\n')) == [("line 2", {"x": "a,b", "y": "c\td"})]


def test_tables_written_by_the_standard_library(tmp_path):
    rows = [{"a": 'x "y", z', "b": "one\ntwo"}, {"a": "", "b": "\u2028\t'"}]
    for name, dialect in (("a.csv", "excel"), ("a.tsv", "excel-tab")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["a", "b"], dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
        assert [row for _, row in read_rows(tmp_path / name)] == rows


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json"])
def test_a_list_and_lines_are_told_by_content(write, kind):
    assert rows_of(write("a" + kind, '[{"x": "1"},\n{"x": "2"}]'))[1] == ("row 2", {"x": "2"})
    assert rows_of(write("b" + kind, '{"x": "1"}\n{"x": "2"}'))[1] == ("line 2", {"x": "2"})
    assert rows_of(write("c" + kind, '{"x": "1"}\n["2"]'))[1] == ("line 2", ["2"])


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(write, suffix):
    lines = [b'{"x": "1"}\n', b'{"x": "2"}\n'] * 500
    compress = COMPRESS[suffix]
    # Two streams in one file, as `cat a.gz b.gz` makes.
    data = compress(b"".join(lines)) + compress(b'{"x": "end"}')
    rows = rows_of(write("a.jsonl" + suffix, data))
    assert len(rows) == 1001
    assert rows[1] == ("line 2", {"x": "2"}) and rows[-1] == ("line 1001", {"x": "end"})
    assert rows_of(write("a.csv" + suffix.upper(), compress(b"x\n1\n"))) == [("line 2", {"x": "1"})]
    assert rows_of(write("a.txt" + suffix, compress(b"x\n\ny"))) == [
        ("line 1", {"text": "x"}),
        ("line 3", {"text": "y"}),
    ]
    noise = "".join(f'{{"x": "{number**9}"}}\n' for number in range(3000)).encode()
    for damaged in (compress(noise)[:-9], b"no compressed file at all"):
        path = write("b.jsonl" + suffix, damaged)
        with pytest.raises(DataError) as caught:
            rows_of(path)
        assert f"b.jsonl{suffix}: is incomplete or no {suffix[1:]} file (" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_arrow_files_and_streams(tmp_path):
    rows = [{"m": [{"role": "user", "n": i}], "t": str(i)} for i in range(5)]
    table = pa.Table.from_pylist(rows)
    expected = [(f"row {i + 1}", row) for i, row in enumerate(rows)]
    for name, writer in (("a.arrow", pa.ipc.new_stream), ("b.arrow", pa.ipc.new_file)):
        with writer(tmp_path / name, table.schema) as file:
            file.write_table(table, max_chunksize=2)
        assert rows_of(tmp_path / name) == expected
    feather.write_feather(table, tmp_path / "c.feather", compression="zstd")
    assert rows_of(tmp_path / "c.feather") == expected


def test_every_kind_has_a_reader():
    assert tuple(READERS) == KINDS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.csv", "a.tsv"])
def test_empty_file_has_no_rows(write, name):
    assert rows_of(write(name, "")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"x": 1}\n{"x": \n', "a.jsonl: line 2: not valid JSON"),
        (
            "a.jsonl",
            '{"x": "y"\n',
            "a.jsonl: line 1: not valid JSON (Expecting ',' delimiter, column 10)",
        ),
        ("a.json", '[{"x": 1},\n{"x" 2}]', "a.json: line 2: not valid JSON"),
        ("a.json", '{\n "x": 1\n}', "a.json: line 1: not valid JSON"),
        ("a.jsonl", b'{"x": "1"}\n{"x": "\xff"}\n', "a.jsonl: line 2: byte 8 is not UTF-8"),
        ("a.json", b'[{"x": "\xff"}]', "a.json: line 1: byte 9 is not UTF-8"),
        ("a.jsonl", '[{"x": 1}]\n[{"x": 2}]', "a.jsonl: line 2: not valid JSON (Extra data"),
        (
            "a.jsonl",
            '{"x": 1}\n{"x": %s}\n' % ("9" * 5000),
            "a.jsonl: line 2: cannot be read (an integer has",
        ),
        ("a.jsonl", "[1]\n" + "[" * 200_000, "a.jsonl: line 2: not valid JSON (Extra data"),
        (
            "a.jsonl",
            '{"x": %s}' % ("[" * 200_000),
            "a.jsonl: line 1: cannot be read (nested deeper",
        ),
        ("a.json", '[{"x": %s}]' % ("9" * 5000), "a.json: cannot be read (an integer has"),
        ("a.csv", "x,y\n1,2\n3\n", "a.csv: line 3: 1 cells in a row, but the header has 2"),
        ("a.csv", 'x,y\n1,"a\nb"\n3,4,5', "a.csv: line 4: 3 cells in a row, but the header"),
        ("a.csv", "x,y,x\n1,2,3\n", "a.csv: line 1: the header names 'x' twice"),
        ("a.csv", 'x,y\n1,2\n3,"open\nand on\n', "a.csv: line 3: not valid CSV (unexpected end"),
        ("a.csv", 'x,y\n1,"a"b\n', "a.csv: line 2: not valid CSV"),
        ("a.csv", b"x\n\xff\n", "a.csv: line 2: byte 1 is not UTF-8"),
        ("a.arrow", b"no arrow at all", "a.arrow: not a readable Arrow file after row 0"),
        ("a.arrow", b"", "a.arrow: not a readable Arrow file after row 0"),
        ("a.feather", b"ARROW1 cut", "a.feather: not a readable Arrow file after row 0"),
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


TEXT = pa.array(["fine", "too"])
NOT_UTF8 = pa.array([b"ok", b"\xff"]).view(pa.string())
FAR_DATE = pa.array([0, 10**7], pa.date32())  # days; Python's dates end with the year 9999


@pytest.mark.parametrize(
    ("column", "cause"), [(NOT_UTF8, "UnicodeDecodeError"), (FAR_DATE, "OverflowError")]
)
def test_values_that_python_cannot_hold_are_named_by_row_and_column(tmp_path, column, cause):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXT, "other": column}), path)
    with pytest.raises(DataError, match=rf"a\.parquet: row 2: column 'other' .*\({cause}"):
        rows_of(path)


def test_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([TEXT, TEXT], names=["x", "x"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: has two columns 'x'; rename or remove one"):
        rows_of(path)


def test_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt: cannot be read"):
        rows_of(tmp_path / "folder.txt")


def test_an_arrow_file_with_a_damaged_offset(tmp_path):
    """Arrow itself reads beyond its buffers, which ends the process."""
    table = pa.table({"prompt": ["abc"] * 5})
    file = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)
    content = file.read_bytes()
    offsets = np.arange(0, 18, 3, dtype=np.int32).tobytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, np.int32([0, 3, 2**30, 9, 12, 15]).tobytes()))

    with pytest.raises(DataError, match=r"a\.arrow: not a readable Arrow file after row 0"):
        list(read_rows(file))
