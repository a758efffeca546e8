"""File formats, read whole and in pieces."""

from __future__ import annotations

import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.files import DataFile
from rayrlhf.data.sources.readers import plan_chunks, read_chunk


def read(type_: str, path: Path, **options: int) -> list[tuple[int, Any]]:
    """All rows as (row, columns), with the problem in the place of the columns of a bad one."""
    chunks = plan_chunks(DataFile(type_, str(path)), **options)
    rows = [row for chunk in chunks for row in read_chunk(chunk)]
    assert {row.file for row in rows} <= {str(path)}
    return [(row.row, row.problem or row.columns) for row in rows]


def test_json_lines_keep_their_line_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}\n{"b": [1, null]}')
    assert read("jsonl", path) == [(1, {"a": 1}), (4, {"a": "é"}), (5, {"b": [1, None]})]
    assert read("json", path) == read("jsonl", path)


def test_bad_lines_are_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"a": 1}\n{"a": \n{"a": "\xff"}\n[1]\n"text"\n12\nnull\n' + b"[" * 100_000 + b'\n{"a": 2}\n'
    )
    rows = read("jsonl", path)
    assert [row for row, _ in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert rows[0][1] == {"a": 1}
    assert rows[1][1] == "not valid JSON (Expecting value at column 7)"
    assert rows[2][1] == "not UTF-8 (byte 0xff at position 8)"
    assert rows[3][1].startswith("an array, not an object")
    assert rows[4][1].startswith("a string, not")
    assert rows[5][1].startswith("a number, not")
    assert rows[6][1].startswith("null, not")
    assert rows[7][1].startswith("not valid JSON")
    assert rows[8][1] == {"a": 2}


@given(
    lines=st.lists(st.one_of(st.just(""), st.text("ab", max_size=12)), max_size=30),
    ends_with_newline=st.booleans(),
    chunk_bytes=st.integers(1, 40),
)
def test_chunks_of_any_size_give_the_same_rows(tmp_path_factory, lines, ends_with_newline, chunk_bytes):
    path = tmp_path_factory.mktemp("chunks") / "a.jsonl"
    texts = [json.dumps({"text": line}) if line else "" for line in lines]
    path.write_text("\n".join(texts) + ("\n" if ends_with_newline else ""))
    expected = [(number, {"text": line}) for number, line in enumerate(lines, start=1) if line]
    assert read("jsonl", path, chunk_bytes=chunk_bytes) == expected


def test_a_file_is_cut_after_whole_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n' * 10)  # 9 bytes each: a piece of 20 bytes ends with its third line
    chunks = plan_chunks(DataFile("jsonl", str(path)), chunk_bytes=20)
    assert [(chunk.start, chunk.stop, chunk.first_row) for chunk in chunks] == [
        (0, 27, 1),
        (27, 54, 4),
        (54, 81, 7),
        (81, 90, 10),
    ]


def test_numbers_that_python_does_not_parse_are_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": ' + "9" * 5000 + "}")
    [(row, problem)] = read("jsonl", path)
    assert row == 1 and str(problem).startswith("not valid JSON (Exceeds the limit")


def test_a_json_array(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(' \n[{"a": 1},\n {"a": 2}, 3]')
    assert read("json", path)[:2] == [(1, {"a": 1}), (2, {"a": 2})]
    assert read("json", path)[2][0] == 3
    assert read("json", path)[2][1].startswith("a number, not an object")
    path.write_text('[{"a": 1},\n {"a": }]')
    with pytest.raises(DataError, match=r"a.json:2: not valid JSON \(Expecting value at column 8\)"):
        read("json", path)
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(DataError, match=r"cannot be read as json: .*utf-8"):
        read("json", path)


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfq,label\r\n"two\nlines",1\r\nshort\r\n\r\n'
        b'"a ""quoted"" one",2,3\r\nbad \xff,4\r\nlast,5'
    )
    assert read("csv", path) == [
        (2, {"q": "two\nlines", "label": "1"}),
        (4, "1 fields where the header has 2"),
        (6, "3 fields where the header has 2"),
        (7, "not UTF-8 (in column 'q')"),
        (8, {"q": "last", "label": "5"}),
    ]


def test_a_field_longer_than_csvs_own_limit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q\n" + "x" * 200_000)
    assert read("csv", path) == [(2, {"q": "x" * 200_000})]


def test_a_quote_that_is_never_closed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('q\nfine\n"open\nmore\n')
    assert read("csv", path) == [(2, {"q": "fine"}), (3, "not valid CSV (unexpected end of data)")]


@pytest.mark.parametrize("header", ["q,q", "q,"])
def test_a_csv_header_must_name_every_column_once(tmp_path, header):
    path = tmp_path / "a.csv"
    path.write_text(header + "\n1,2\n")
    with pytest.raises(DataError, match=r"a.csv:1: the header names"):
        read("csv", path)


ROWS = [{"q": f"row {n}", "n": n, "day": date(2024, 1, 1 + n % 28)} for n in range(2500)]


def test_parquet_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1100)
    assert len(list(plan_chunks(DataFile("parquet", str(path))))) == 3
    assert read("parquet", path) == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize(("make", "chunks"), [(pa.ipc.new_file, 3), (pa.ipc.new_stream, 1)])
def test_arrow_files_and_streams(tmp_path, make, chunks):
    path = tmp_path / "a.arrow"
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1100)
    assert len(list(plan_chunks(DataFile("arrow", str(path))))) == chunks
    assert read("arrow", path) == list(enumerate(ROWS, start=1))


def test_text_in_arrow_that_is_not_utf8_costs_one_row(tmp_path):
    path = tmp_path / "a.parquet"
    broken = pa.array([b"good", b"\xff\xfe", b"fine"]).cast(pa.binary())
    text = pa.StringArray.from_buffers(3, broken.buffers()[1], broken.buffers()[2])
    pq.write_table(pa.table({"q": text}), path)
    assert read("parquet", path) == [
        (1, {"q": "good"}),
        (2, "holds text that is not UTF-8"),
        (3, {"q": "fine"}),
    ]


@pytest.mark.parametrize("type_", ["parquet", "arrow"])
def test_a_file_that_is_something_else(tmp_path, type_):
    path = tmp_path / "a.bin"
    path.write_text("not at all")
    with pytest.raises(DataError, match=rf"a.bin cannot be read as {type_}"):
        read(type_, path)


@pytest.mark.parametrize("type_", ["jsonl", "json", "csv"])
def test_empty_files_have_no_rows(tmp_path, type_):
    path = tmp_path / "empty"
    path.touch()
    assert read(type_, path) == []


def test_a_saved_data_set(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list([{"q": f"row {n}", "turns": [{"role": "user"}]} for n in range(12)])
    saved.select(range(2, 12)).save_to_disk(tmp_path / "saved")
    rows = read("dataset", tmp_path / "saved")
    assert rows == [(n + 1, {"q": f"row {n + 2}", "turns": [{"role": "user"}]}) for n in range(10)]


@pytest.mark.parametrize(
    "line", ['{"prompt": "a", "prompt": "b"}', '{"m": [{"role": "user", "role": "x"}], "prompt": "b"}']
)
def test_a_key_twice_in_a_row_is_a_bad_row(tmp_path, line):
    """The last value was taken, without a word."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{line}\n')
    [(_, good), (number, problem)] = read("jsonl", path)
    assert good == {"prompt": "x"} and number == 2
    assert "duplicate key" in problem
    array = tmp_path / "a.json"
    array.write_text(f"[{line}]")
    with pytest.raises(DataError, match="duplicate key"):
        read("json", array)


def test_two_columns_of_one_name_are_refused(tmp_path):
    """Parquet and Arrow allow them; the last one was taken."""
    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has two columns 'prompt'"):
        read("parquet", tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="has two columns 'prompt'"):
        read("arrow", tmp_path / "a.arrow")


@pytest.mark.parametrize("type_", ["jsonl", "json", "csv"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
        (gzip.compress(b'{"prompt": "a"}'), "gzip"),
        (b"PK\x03\x04 and more", "zip"),
        (b"PAR1 and more", "Parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
    ],
)
def test_a_text_file_that_is_none_says_what_it_is(tmp_path, type_, content, reason):
    path = tmp_path / f"a.{type_}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read(type_, path)
