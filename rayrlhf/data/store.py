"""The prepared rows of a run, prompts or examples: one memory-mapped Arrow file, read by all workers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from rayrlhf.data.rows.row import DataError
from rayrlhf.samples import EncodedImage, Example, Prompt, TokenSequence
from rayrlhf.storage.run_file import RunFile

IMAGE_FIELDS = [  # in the order of their tokens, the same in every sequence of a row
    pa.field("images", pa.list_(pa.large_binary())),  # as in their files
    pa.field("image_tokens", pa.list_(pa.int32())),  # of each image
]
PROMPT_FIELDS = [
    pa.field("prompt_ids", pa.list_(pa.int32())),
    pa.field("prompt", pa.string()),
    pa.field("columns_json", pa.string()),
    *IMAGE_FIELDS,
]
PROMPT_SCHEMA = pa.schema([pa.field("row_id", pa.int64()), *PROMPT_FIELDS])

# A row holds one or two sequences; the inner lists have one entry per token.
SEQUENCE_FIELDS = [
    pa.field("input_ids", pa.list_(pa.list_(pa.int32()))),
    pa.field("loss_mask", pa.list_(pa.list_(pa.uint8()))),
    pa.field("targets", pa.list_(pa.list_(pa.float32()))),  # inner lists are empty if no token is labelled
    pa.field("value", pa.float64()),
    *IMAGE_FIELDS,
]
EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.int64()),
        pa.field("num_tokens", pa.int64()),  # of all sequences of the row
        *SEQUENCE_FIELDS,
    ]
)

STORE_BATCH_ROWS = 1024
IMAGE_BATCH_ROWS = 32  # of a store with images, of which 1024 rows could be gigabytes
COUNTS_KEY, FINGERPRINT_KEY = b"rayrlhf.counts", b"rayrlhf.fingerprint"


class ArrowRows:
    """Random access to rows of an Arrow IPC file without reading the rest."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        self.schema = reader.schema
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, indices: Iterable[int]) -> pa.Table:
        """These rows in this order; Arrow's own `take` copies a chunked column completely. Raises
        `IndexError`.
        """
        wanted = np.fromiter(indices, dtype=np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if outside.size:
            raise IndexError(f"row {outside[0]} of {len(self)}")
        which = np.searchsorted(self._ends, wanted, side="right")
        picked = []
        for index, batch_index in zip(wanted.tolist(), which.tolist(), strict=True):
            batch = self._batches[batch_index]
            picked.append(batch.slice(index - int(self._ends[batch_index]) + batch.num_rows, 1))
        return pa.Table.from_batches(picked, schema=self.schema).combine_chunks()

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column [rows]; reads only this column."""
        parts = [batch.column(column).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def first_lengths(self, column: str) -> np.ndarray:
        """Length of the first list of each row [rows], in a column of lists of lists that are not empty."""
        parts = []
        for batch in self._batches:
            lists: Any = batch.column(column)
            inner = lists.flatten().value_lengths().to_numpy(zero_copy_only=False)
            sizes = lists.value_lengths().to_numpy(zero_copy_only=False)
            parts.append(inner[np.cumsum(sizes) - sizes].astype(np.int64))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class RowStore:
    """Rows prepared once, in an Arrow file: row `i` is the one with `row_id == i`.

    `counts` are statistics of the preparation: `rows`, `skipped_bad`, `dropped_long`, `truncated`,
    `unused_by_mixing` and others by kind of row. `fingerprint` is a hash of the contents and the order: it is
    equal for equal data.
    """

    KIND: ClassVar[str] = "a row"  # kind of row, for messages

    def __init__(self, file: str | os.PathLike[str], rows: ArrowRows) -> None:
        metadata = rows.schema.metadata or {}
        self.file = file if isinstance(file, RunFile) else RunFile(os.path.abspath(file))
        self.path = Path(self.file.path)
        self.counts: dict[str, int] = json.loads(metadata[COUNTS_KEY])
        self.fingerprint = metadata[FINGERPRINT_KEY].decode()
        self._rows = rows

    @classmethod
    def open(cls, file: str | os.PathLike[str]) -> Self:
        """Memory-maps the store. Raises `DataError` if there is none."""
        try:
            return cls(file, ArrowRows(file))
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f"{file} is not {cls.KIND} store ({error!r}); prepare the data again") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.file,)  # a worker maps the file itself; rows are not serialised

    def __len__(self) -> int:
        return len(self._rows)

    def stored(self, file: RunFile) -> Self:
        """The same rows where all nodes find them."""
        return type(self)(file, self._rows)

    @property
    def row_bytes(self) -> int:
        """Mean size of a row."""
        return self.path.stat().st_size // max(1, len(self))

    def take(self, row_ids: Iterable[int]) -> pa.Table:
        """The rows with these ids, in this order, with the columns of the store's schema.

        Raises `IndexError` for an unknown id.
        """
        return self._rows.take(row_ids).replace_schema_metadata(None)


class PromptStore(RowStore):
    """Prepared prompts, with the columns of `PROMPT_SCHEMA`."""

    KIND = "a prompt"

    def __getitem__(self, row_id: int) -> Prompt:
        return prompts_of(self.take([row_id]))[0]

    def __iter__(self) -> Iterator[Prompt]:
        for row_id in range(len(self)):
            yield self[row_id]


def prompts_of(table: pa.Table) -> list[Prompt]:
    """The rows of a table with the columns of `PROMPT_SCHEMA`."""
    columns = [_values(table, name) for name in PROMPT_SCHEMA.names]
    return [
        Prompt(
            row_id=row_id,
            prompt_ids=prompt_ids,
            prompt=prompt,
            columns=json.loads(columns_json),
            images=_images_of(contents, num_tokens),
        )
        for row_id, prompt_ids, prompt, columns_json, contents, num_tokens in zip(*columns, strict=True)
    ]


def _values(table: pa.Table, name: str) -> list[Any]:
    """Nulls for the images of a store that an earlier version has written."""
    return table.column(name).to_pylist() if name in table.column_names else [None] * table.num_rows


def _images_of(contents: list[bytes] | None, num_tokens: list[int] | None) -> tuple[EncodedImage, ...]:
    return tuple(map(EncodedImage, contents or [], num_tokens or []))


class ExampleStore(RowStore):
    """Prepared examples, with the columns of `EXAMPLE_SCHEMA`."""

    KIND = "an example"

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Tokens of every example, [rows] int64. Reads only this column."""
        return self._rows.numbers("num_tokens")

    @cached_property
    def first_tokens(self) -> np.ndarray:
        """Tokens of every example's first sequence, [rows] int64. Reads only offsets."""
        return self._rows.first_lengths("input_ids")

    def __getitem__(self, row_id: int) -> Example:
        return examples_of(self.take([row_id]))[0]

    def __iter__(self) -> Iterator[Example]:
        for row_id in range(len(self)):
            yield self[row_id]


def examples_of(table: pa.Table) -> list[Example]:
    """The rows of a table with the columns of `EXAMPLE_SCHEMA`."""
    names = ("row_id", "input_ids", "loss_mask", "targets", "value", "images", "image_tokens")
    columns = [_values(table, name) for name in names]
    return [
        Example(row_id, tuple(map(TokenSequence, input_ids, loss_mask, targets)), value, _images_of(*images))
        for row_id, input_ids, loss_mask, targets, value, *images in zip(*columns, strict=True)
    ]


def in_order(rows: ArrowRows, order: np.ndarray, batch_rows: int = STORE_BATCH_ROWS) -> Iterator[pa.Table]:
    """The rows in the order of their indices [rows], in tables of a bounded size."""
    for start in range(0, len(order), batch_rows):
        yield rows.take(order[start : start + batch_rows])


def write_tables(
    tables: Iterable[pa.Table], schema: pa.Schema, counts: Mapping[str, int], fingerprint: str, path: Path
) -> None:
    """Writes tables that have all columns of `schema` except its first, `row_id`, the row number, and
    images, which rows need not have.

    The file is written atomically.
    """
    schema = schema.with_metadata({COUNTS_KEY: json.dumps(dict(counts)), FINGERPRINT_KEY: fingerprint})
    partial_path = path.with_name(path.name + ".partial")
    start = 0
    with pa.OSFile(str(partial_path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in tables:
            row_ids = pa.array(np.arange(start, start + table.num_rows, dtype=np.int64))
            columns = [_column(table, schema.field(name)) for name in schema.names[1:]]
            writer.write_table(pa.Table.from_arrays([row_ids, *columns], schema=schema))
            start += table.num_rows
    os.replace(partial_path, path)


def _column(table: pa.Table, field: pa.Field) -> Any:
    if field in IMAGE_FIELDS and field.name not in table.column_names:
        return pa.nulls(table.num_rows, field.type)
    return table.column(field.name)
