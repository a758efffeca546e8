"""The file of prepared prompts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.store import (
    PROMPT_FIELDS,
    PROMPT_SCHEMA,
    STORE_BATCH_ROWS,
    ArrowRows,
    PromptStore,
    in_order,
    write_tables,
)
from rayrlhf.samples import Prompt


def make_store(path: Path, order: list[int]) -> PromptStore:
    """Row i of the spool file holds [i, i + 1] and the text "i"; it is written in batches of 3."""
    count = max(order) + 1
    rows = [
        {"prompt_ids": [i, i + 1], "prompt": str(i), "columns_json": json.dumps({"n": i})}
        for i in range(count)
    ]
    table = pa.Table.from_pylist(rows, pa.schema(PROMPT_FIELDS))
    spool = path.with_name("spool.arrow")
    with pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    tables = in_order(ArrowRows(spool), np.array(order))
    write_tables(tables, PROMPT_SCHEMA, {"rows": len(order)}, "f00d", path)
    return PromptStore.open(path)


def test_rows_come_back_in_the_given_order(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.arrow", [7, 0, 3])
    assert len(store) == 3
    assert list(store) == [
        Prompt(0, [7, 8], "7", {"n": 7}),
        Prompt(1, [0, 1], "0", {"n": 0}),
        Prompt(2, [3, 4], "3", {"n": 3}),
    ]
    assert (store.counts, store.fingerprint) == ({"rows": 3}, "f00d")
    assert not list(tmp_path.glob("*.partial"))


def test_rows_are_taken_across_batches(tmp_path: Path) -> None:
    count = 2 * STORE_BATCH_ROWS + 5
    store = make_store(tmp_path / "store.arrow", list(range(count)))
    wanted = [count - 1, 0, STORE_BATCH_ROWS, STORE_BATCH_ROWS - 1, 0]
    table = store.take(wanted)
    assert table.column("row_id").to_pylist() == wanted
    assert table.column("prompt_ids").to_pylist() == [[i, i + 1] for i in wanted]


@pytest.mark.parametrize("row_id", [3, -1])
def test_there_is_no_row_outside(tmp_path: Path, row_id: int) -> None:
    store = make_store(tmp_path / "store.arrow", [0, 1, 2])
    with pytest.raises(IndexError, match=f"row {row_id} of 3"):
        store[row_id]


def test_a_store_travels_as_its_path(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store.arrow", list(range(3000)))
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[2999] == store[2999]


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    table = pa.table({"a": [1]})
    with (
        pa.OSFile(str(tmp_path / "other.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (tmp_path / "text.arrow").write_text("no arrow")
    for name in ("other.arrow", "text.arrow", "none.arrow"):
        with pytest.raises(DataError, match=f"{name} is not a prompt store"):
            PromptStore.open(tmp_path / name)
