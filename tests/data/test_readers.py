"""File formats, read whole and in pieces."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from rayrlhf.data.files import DataFile
from rayrlhf.data.readers import plan_chunks, read_chunk
from rayrlhf.data.rows import DataError, RawRow

ROWS: list[dict[str, Any]] = [
    {"prompt": "one", "label": "1"},
    {"prompt": "zwölf", "label": "two\nlines"},
    {"prompt": "3", "label": ""},
]


def read(type_: str, path: Path, **options: int) -> list[RawRow]:
    return [row for chunk in plan_chunks(DataFile(type_, str(path)), **options) for row in read_chunk(chunk)]


def write_rows(type_: str, path: Path) -> None:
    if type_ == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif type_ == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif type_ == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    elif type_ in ("arrow file", "arrow stream"):
        table = pa.Table.from_pylist(ROWS)
        writer = pa.ipc.new_file if type_ == "arrow file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, writer(sink, table.schema) as out:
            out.write_table(table, max_chunksize=2)
    else:
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(ROWS).save_to_disk(path)


@pytest.mark.parametrize("type_", ["jsonl", "json", "parquet", "arrow file", "arrow stream", "dataset"])
def test_every_format_gives_rows_numbered_from_one(tmp_path: Path, type_: str) -> None:
    path = tmp_path / "rows"
    write_rows(type_, path)
    wanted = [RawRow(str(path), number, row) for number, row in enumerate(ROWS, start=1)]
    assert read(type_.split()[0], path) == wanted


def test_csv_rows_are_numbered_by_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    # Line 1 is the header; the second record covers lines 3 and 4.
    assert [(row.row, row.columns) for row in read("csv", path)] == list(zip([2, 3, 5], ROWS, strict=True))


@pytest.mark.parametrize("chunk_bytes", [1, 7, 30, 31, 1000])
def test_lines_are_the_same_in_pieces_of_any_size(tmp_path: Path, chunk_bytes: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\n{"n": 2}\n   \n{"n": 3}')  # a byte-order mark, empty lines
    found = [(row.row, row.columns) for row in read("jsonl", path, chunk_bytes=chunk_bytes)]
    assert found == [(1, {"n": 1}), (3, {"n": 2}), (5, {"n": 3})]


def test_a_file_is_cut_into_pieces(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n' * 10)  # 9 bytes each: a piece of 20 bytes ends with its third line
    chunks = list(plan_chunks(DataFile("jsonl", str(path)), chunk_bytes=20))
    assert [(chunk.start, chunk.stop, chunk.first_row) for chunk in chunks] == [
        (0, 27, 1),
        (27, 54, 4),
        (54, 81, 7),
        (81, 90, 10),
    ]


def test_json_may_hold_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert [(row.row, row.columns) for row in read("json", path)] == [(1, {"n": 1}), (2, {"n": 2})]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"prompt": "a"', "not valid JSON"),
        (b'["a"]', "an array, not an object"),
        (b'"a"', "a string, not an object"),
        (b"null", "null, not an object"),
        (b"7", "a number, not an object"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 0xff at position 13)"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_broken_line_is_a_row_with_a_problem(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    first, broken, last = read("jsonl", path)
    assert (first.columns, last.columns, first.problem, last.problem) == ({"n": 1}, {"n": 3}, "", "")
    assert broken.place == f"{path}:2"
    assert problem in broken.problem


def test_broken_records_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,label\na,b\na,b,c\n\xe4,b\n")
    good, many, bytes_ = read("csv", path)
    assert good.columns == {"prompt": "a", "label": "b"}
    assert (many.row, many.problem) == (3, "3 fields where the header has 2")
    assert (bytes_.row, bytes_.problem) == (4, "not UTF-8 (in column 'prompt')")


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("rows.json", b'[{"n": 1},\n {"n": 2,}]', "rows.json:2: not valid JSON"),
        ("rows.csv", b"a,a\n1,2\n", "rows.csv:1: the header names 'a' twice"),
        ("rows.csv", b"a,\n1,2\n", "rows.csv:1: the header names a column with nothing"),
        ("rows.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("rows.arrow", b"not arrow at all", "cannot be read as arrow"),
    ],
)
def test_a_file_broken_as_a_whole_is_an_error(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        read(path.suffix[1:], path)


@pytest.mark.parametrize("type_", ["jsonl", "json", "csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, type_: str) -> None:
    (tmp_path / "rows").write_bytes(b"")
    assert read(type_, tmp_path / "rows") == []


def test_text_in_a_parquet_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    column = pa.array([b"fine", b"\xff", b"too"]).cast(pa.string(), safe=False).view(pa.string())
    pyarrow.parquet.write_table(pa.table({"prompt": column}), path)
    assert [(row.row, row.problem) for row in read("parquet", path)] == [
        (1, ""),
        (2, "holds text that is not UTF-8"),
        (3, ""),
    ]
