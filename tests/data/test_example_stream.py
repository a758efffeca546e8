"""What a task fetches for a rank is what the plan has for it, from any step on."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from rayrlhf.config.train import SupervisedTrainConfig
from rayrlhf.data.batch_plan import RowOrder, plan_steps
from rayrlhf.data.packed_order import PackedOrder
from rayrlhf.data.step_order import StepOrder, step_order
from rayrlhf.data.store import EXAMPLE_SCHEMA, ExampleStore, write_tables
from rayrlhf.data.stream import _fetch_examples, iter_examples, step_ranges

LENGTHS = [3, 9, 1, 4, 7, 2, 5]


class FakeShard:
    def __init__(self, tables: list[pa.Table]) -> None:
        self.tables = tables

    def iter_batches(self, **_: Any) -> Any:
        return (table.slice(index, 1) for table in self.tables for index in range(len(table)))


@pytest.fixture
def store(tmp_path: Path) -> ExampleStore:
    columns = {
        "num_tokens": LENGTHS,
        "input_ids": [[[row] * length] for row, length in enumerate(LENGTHS)],
        "loss_mask": [[[1] * length] for length in LENGTHS],
        "targets": [[[]] for _ in LENGTHS],
        "value": [float(row) for row in range(len(LENGTHS))],
        "images": [[] for _ in LENGTHS],
        "image_tokens": [[] for _ in LENGTHS],
    }
    fields = [field for field in EXAMPLE_SCHEMA if field.name != "row_id"]
    table = pa.Table.from_pydict(columns, pa.schema(fields))
    write_tables([table], EXAMPLE_SCHEMA, {"rows": len(LENGTHS)}, "", tmp_path / "store.arrow")
    return ExampleStore.open(tmp_path / "store.arrow")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 4, 7])
def test_19_ranks_get_their_part_of_a_plan_that_nobody_has_kept(
    store: ExampleStore, world_size: int, start: int
) -> None:
    order = RowOrder(len(LENGTHS), 3, 23, seed=4)  # eight steps, the last of two rows
    check_fetched(store, order, world_size, start)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_ranks_get_their_part_of_an_order_that_is_kept(
    store: ExampleStore, tmp_path: Path, world_size: int, start: int
) -> None:
    # 62 tokens of two epochs in steps of 20, the last of which has the rest
    size = {"tokens_per_step": 20, "max_tokens_per_micro_batch": 10, "num_epochs": 2}
    order = step_order(SupervisedTrainConfig.model_validate(size), store.num_tokens, seed=4, shuffle=True)
    assert isinstance(order, PackedOrder) and len(order) >= 4
    check_fetched(store, pickle.loads(pickle.dumps(order.saved(tmp_path))), world_size, start)


def check_fetched(store: ExampleStore, order: StepOrder, world_size: int, start: int) -> None:
    pack = {"world_size": world_size, "budget_tokens": 10}
    plans = list(plan_steps(order, np.array(LENGTHS), start=start, **pack))
    blocks = step_ranges(start, len(order), world_size, order.most_rows)
    for rank in range(world_size):
        mine = [block for block in blocks if block["rank"][0].as_py() == rank]
        shard = FakeShard([_fetch_examples(store.file, order, block, **pack) for block in mine])
        found = list(iter_examples(cast(Any, shard), rank, start))
        assert [step for step, _ in found] == list(range(start, len(order)))
        rows = [[[example.row_id for example in batch] for batch in batches] for _, batches in found]
        assert rows == [plan.ranks[rank] for plan in plans]
        examples = [example for _, batches in found for batch in batches for example in batch]
        assert all(list(e.sequences[0].input_ids) == [e.row_id] * LENGTHS[e.row_id] for e in examples)
