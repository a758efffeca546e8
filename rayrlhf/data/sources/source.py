"""Reads the sources of the config with Ray Data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray.data
from ray.data import DataContext, Dataset

from rayrlhf.config.data import SourceConfig
from rayrlhf.data.rows.images import with_bytes_as_text
from rayrlhf.data.rows.row import DataError, RawRow, columns_to_json
from rayrlhf.data.sources.files import DataFile, Split, resolve_source
from rayrlhf.data.sources.hub_files import shared_copy
from rayrlhf.data.sources.readers import Chunk, plan_chunks, read_chunk
from rayrlhf.placement.preload import data_task_options

# A fraction of a CPU, so that reading continues on clusters with few and partly occupied CPUs.
READ_TASK_CPUS = 0.5


def read_sources(
    sources: Sequence[SourceConfig],
    split: Split,
    split_name: str | None = None,
    *,
    copies: Path,
    images_key: str | None = None,
) -> Dataset:
    """All rows of all sources, in the order of the sources, their files and their rows.

    Columns: `source` (index into `sources`), `_file`, `_row` (1-based; 0 for a problem of the file as a
    whole), `columns_json` (the row as one JSON object: rows of one file need not share a schema, so Arrow
    columns cannot hold them), `problem` (why the row could not be read; empty for a good one), `padded` and
    `left_out` (JSON lists of what `RawRow` has). Lazy, and one task per few megabytes. `split_name` is what
    the split is called if a source has several; `copies` is a folder that all nodes share, to which data sets
    of the hub are copied; `images_key` is data.images_key. Raises `DataError` for files that do not exist or
    cannot be opened; call it inside `ordered_and_quiet`.
    """
    chunks: list[dict[str, Any]] = []
    for index, source in enumerate(sources):
        for file in resolve_source(source.path, split, split_name):
            if file.type == "hub":
                file = DataFile("dataset", shared_copy(file.path, copies))
            about = {"source": index, "images_key": images_key}
            chunks += [{**about, **asdict(chunk)} for chunk in plan_chunks(file)]
    if not chunks:
        raise DataError(
            f"data.{split} holds no rows: {', '.join(s.path for s in sources) or 'no source is given'}"
        )
    dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks))
    return dataset.flat_map(_rows_of_chunk, num_cpus=READ_TASK_CPUS, **data_task_options())


def _rows_of_chunk(described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    source, images_key = described.pop("source"), described.pop("images_key")
    chunk = Chunk(**described)
    try:
        for row in read_chunk(chunk):
            columns_json, left_out = columns_to_json(with_bytes_as_text(row.columns, images_key))
            row = replace(row, left_out=(*row.left_out, *left_out))
            yield _described(source, row, "" if row.problem else columns_json)
    except DataError as error:  # Ray would wrap it in its own error; as a row it arrives unchanged
        yield _described(source, RawRow(chunk.path, 0, {}, str(error)), "")


def _described(source: int, row: RawRow, columns_json: str) -> dict[str, Any]:
    return {
        "source": source,
        "_file": row.file,
        "_row": row.row,
        "columns_json": columns_json,
        "problem": row.problem,
        "padded": json.dumps(row.padded),
        "left_out": json.dumps(row.left_out),
    }


@contextmanager
def ordered_and_quiet() -> Iterator[None]:
    """Data sets created inside yield their blocks in order; only errors are printed while they run."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    consoles = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in consoles]
    for handler in consoles:
        handler.setLevel(logging.ERROR)
    try:
        with DataContext.current(context):
            yield
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)
