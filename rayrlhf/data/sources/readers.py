"""Reads data files in chunks. An unreadable row is returned with its problem instead of an exception."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayrlhf.data.rows.row import DataError, RawRow
from rayrlhf.data.sources.files import DataFile
from rayrlhf.data.sources.hub_files import load_hub_dataset

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_BYTES = 4 << 20  # of text; small enough that a medium-sized data set keeps all CPUs busy tokenising
CHUNK_ROWS = 10_000  # of a saved data set
BATCH_ROWS = 1024  # rows of a columnar file that are converted to Python objects at a time
# First bytes of files that are not text, or not in UTF-8.
FOREIGN_STARTS = (
    (b"\xff\xfe", "it is text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "it is text in UTF-16; save it as UTF-8"),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; unpack it"),
    (b"PK\x03\x04", "it is a zip archive; unpack it"),
    (b"PAR1", "it is a Parquet file; name it so, or write parquet@path"),
    (b"version https://git-lfs", "it is a pointer of Git LFS, not the file itself; git lfs pull gets it"),
)
CSV_FIELD_LIMIT = 2**31 - 1  # csv's default limit, 128 kB, is shorter than some conversations


@dataclass(frozen=True)
class Chunk:
    """The part that one task reads, `start` to `stop`: bytes, row groups, record batches or rows, by type."""

    type: str
    path: str
    start: int = 0
    stop: int = -1  # exclusive; -1 is the end of the file
    first_row: int = 1


def plan_chunks(file: DataFile, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Splits a file into chunks that can be read independently, in order. An empty file yields none or an
    empty one.

    Lazy: text is scanned, to count its lines, only as far as chunks are requested. Raises `DataError` for a
    file that cannot be opened as its type.
    """
    with _readable(file):
        if file.type in ("jsonl", "json", "csv"):
            _refuse_foreign(file)
        if file.type == "jsonl" or (file.type == "json" and not _starts_with_bracket(file.path)):
            yield from _line_chunks(file.path, chunk_bytes)
        elif file.type in ("json", "csv"):
            yield Chunk(file.type, file.path)
        elif file.type == "parquet":
            yield from _row_group_chunks(file.path)
        elif file.type == "arrow":
            yield from _record_batch_chunks(file.path)
        else:
            yield from _dataset_chunks(file)


def read_chunk(chunk: Chunk) -> Iterator[RawRow]:
    """The rows of a chunk in file order. Raises `DataError` if the file as a whole is broken."""
    readers = {
        "jsonl": _read_lines,
        "json": _read_json_array,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
        "dataset": _read_dataset,
        "hub": _read_dataset,
    }
    with _readable(DataFile(chunk.type, chunk.path)):
        yield from readers[chunk.type](chunk)


@contextmanager
def _readable(file: DataFile) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise DataError(f"{file.path} cannot be read as {file.type}: {error}") from error


def _refuse_foreign(file: DataFile) -> None:
    with open(file.path, "rb") as stream:
        head = stream.read(32)
    for start, reason in FOREIGN_STARTS:
        if head.startswith(start):
            raise DataError(f"{file.path} cannot be read as {file.type}: {reason}")


def _line_chunks(path: str, chunk_bytes: int) -> Iterator[Chunk]:
    """Splits at line ends, counting the lines before each split so that every row has its line number."""
    start, first_row, size = 0, 1, os.path.getsize(path)
    with open(path, "rb") as stream:
        while start < size:
            if size - start <= chunk_bytes:  # the last chunk: its line count is not needed
                yield Chunk("jsonl", path, start, size, first_row)
                return
            body = stream.read(chunk_bytes)
            tail = b"" if body.endswith(b"\n") else stream.readline()
            stop = start + len(body) + len(tail)
            yield Chunk("jsonl", path, start, stop, first_row)
            first_row += body.count(b"\n") + tail.count(b"\n")
            start = stop


def _starts_with_bracket(path: str) -> bool:
    with open(path, "rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"[")


def _read_lines(chunk: Chunk) -> Iterator[RawRow]:
    with open(chunk.path, "rb") as stream:
        stream.seek(chunk.start)
        position, number = chunk.start, chunk.first_row
        while position < chunk.stop and (line := stream.readline()):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # Windows editors' byte-order mark
            if line.strip():
                yield _row_of_line(chunk.path, number, line)
            position, number = stream.tell(), number + 1


def _row_of_line(path: str, number: int, line: bytes) -> RawRow:
    try:
        columns = json.loads(line.rstrip(b"\r\n").decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return RawRow(path, number, {}, f"not UTF-8 (byte 0x{byte:02x} at position {error.start + 1})")
    except json.JSONDecodeError as error:
        return RawRow(path, number, {}, f"not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        return RawRow(path, number, {}, f"not valid JSON ({error})")
    return _row_of_json(path, number, columns)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Rejects duplicate keys, of which Python would silently use the last. Raises `ValueError`."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in columns if keys.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r} in an object; wanted every key once")
    return columns


def _row_of_json(path: str, number: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(path, number, value)
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    found = names.get(type(value), "a number")
    return RawRow(path, number, {}, f'{found}, not an object; wanted {{"column": value, …}}')


def _read_json_array(chunk: Chunk) -> Iterator[RawRow]:
    with open(chunk.path, encoding="utf-8-sig") as stream:
        try:
            items = json.load(stream, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{chunk.path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
                "wanted one array of objects, or one object per line"
            ) from error
    for number, item in enumerate(items, start=1):
        yield _row_of_json(chunk.path, number, item)


def _read_csv(chunk: Chunk) -> Iterator[RawRow]:
    """Row numbers are the lines on which the records begin. Invalid UTF-8 is reported per record."""
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with open(chunk.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header = next(reader, None)
        if header is None:
            return
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated or "" in header:
            raise DataError(
                f"{chunk.path}:1: the header names {', '.join(map(repr, repeated)) or 'a column'} "
                f"{'twice' if repeated else 'with nothing'}; give every column its own name"
            )
        while True:
            line = reader.line_num + 1
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(chunk.path, line, {}, f"not valid CSV ({error})")
                continue
            if record:
                yield _row_of_record(chunk.path, line, header, record)


def _row_of_record(path: str, line: int, header: list[str], record: list[str]) -> RawRow:
    if len(record) != len(header):
        return RawRow(path, line, {}, f"{len(record)} fields where the header has {len(header)}")
    for name, value in zip(header, record, strict=True):
        if not value.isascii() and any("\udc80" <= char <= "\udcff" for char in value):
            return RawRow(path, line, {}, f"not UTF-8 (in column {name!r})")
    return RawRow(path, line, dict(zip(header, record, strict=True)))


def _row_group_chunks(path: str) -> list[Chunk]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as parquet:
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    firsts = [1 + sum(rows[:group]) for group in range(len(rows))]
    return [Chunk("parquet", path, group, group + 1, firsts[group]) for group in range(len(rows))]


def _read_parquet(chunk: Chunk) -> Iterator[RawRow]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(chunk.path) as parquet:
        groups = list(range(chunk.start, chunk.stop))
        number = chunk.first_row
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=groups):
            yield from _rows_of_batch(chunk.path, number, batch)
            number += batch.num_rows


def _record_batch_chunks(path: str) -> list[Chunk]:
    import pyarrow as pa

    with pa.memory_map(path) as source:
        if (
            source.read(6) != b"ARROW1"
        ):  # the streaming format, which `datasets` writes, can only be read sequentially
            source.seek(0)
            pa.ipc.open_stream(source).schema  # noqa: B018  (raises if the file is not Arrow)
            return [Chunk("arrow", path)]
        source.seek(0)
        reader = pa.ipc.open_file(source)
        rows = [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]
    firsts = [1 + sum(rows[:index]) for index in range(len(rows))]
    return [Chunk("arrow", path, index, index + 1, firsts[index]) for index in range(len(rows))]


def _read_arrow(chunk: Chunk) -> Iterator[RawRow]:
    import pyarrow as pa

    with pa.memory_map(chunk.path) as source:
        if chunk.stop == -1:
            batches = iter(pa.ipc.open_stream(source))
        else:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(chunk.start, chunk.stop))
        number = chunk.first_row
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from _rows_of_batch(chunk.path, number + start, batch.slice(start, BATCH_ROWS))
            number += batch.num_rows


def _rows_of_batch(path: str, first_row: int, batch: pa.RecordBatch) -> Iterator[RawRow]:
    names = batch.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has two columns {twice!r}; give every column its own name")
    try:
        rows = batch.to_pylist(maps_as_pydicts="strict")
    except (UnicodeDecodeError, KeyError) as error:  # find the bad row
        if batch.num_rows == 1:
            is_text = isinstance(error, UnicodeDecodeError)
            problem = "holds text that is not UTF-8" if is_text else "holds a map with a key twice"
            yield RawRow(path, first_row, {}, problem)
            return
        for index in range(batch.num_rows):
            yield from _rows_of_batch(path, first_row + index, batch.slice(index, 1))
        return
    for number, columns in enumerate(rows, start=first_row):
        yield RawRow(path, number, columns, padded=tuple(names))


def _dataset_chunks(file: DataFile) -> list[Chunk]:
    size = len(_load_dataset(file.type, file.path))
    return [
        Chunk(file.type, file.path, start, min(start + CHUNK_ROWS, size), start + 1)
        for start in range(0, size, CHUNK_ROWS)
    ]


def _load_dataset(type_: str, path: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_from_disk(path) if type_ == "dataset" else load_hub_dataset(path)


def _read_dataset(chunk: Chunk) -> Iterator[RawRow]:
    """Skips columns of audio, video and other media: decoding them needs additional libraries, and time.
    Images are not decoded: they have the bytes, or the path, of their files.
    """
    import datasets

    rows = _load_dataset(chunk.type, chunk.path).select(range(chunk.start, chunk.stop))
    kinds = {name: set(_kinds_of(feature)) for name, feature in rows.features.items()}
    decoded = {
        name: sorted(kind.__name__ for kind in found - {datasets.Json} if hasattr(kind, "decode"))
        for name, found in kinds.items()
    }
    images = rows.select_columns([name for name, found in decoded.items() if found == ["Image"]])
    images = images.with_format("arrow")  # the only format that decodes nothing
    decoded = {name: found for name, found in decoded.items() if name not in images.column_names}
    left_out = tuple(f"{name!r} ({', '.join(found)})" for name, found in decoded.items() if found)
    rows = rows.select_columns([name for name, found in decoded.items() if not found])
    padded = tuple(name for name in rows.column_names if datasets.Json not in kinds[name])
    for index, columns in enumerate(rows):
        columns = dict(columns)
        if images.column_names:
            columns |= images[index].to_pylist()[0]
        yield RawRow(chunk.path, chunk.first_row + index, columns, padded=padded, left_out=left_out)


def _kinds_of(feature: Any) -> Iterator[type]:
    """The types of a feature of `datasets` and of all nested features."""
    if isinstance(feature, dict | list):
        for part in feature.values() if isinstance(feature, dict) else feature:
            yield from _kinds_of(part)
    else:
        yield type(feature)
        if hasattr(feature, "feature"):  # of a list
            yield from _kinds_of(feature.feature)
