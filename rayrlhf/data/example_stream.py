"""Ray Data stream of a batch plan: each worker receives its packed micro-batches, step by step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rayrlhf.data.batch_plan import plan_steps
from rayrlhf.data.example_store import ExampleStore, examples_of
from rayrlhf.data.stream import fetched, step_ranges
from rayrlhf.samples import Example

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

# One row holds everything that a rank trains on in a step: ranks then have the same number of rows, and Ray
# Data never splits within a step.


def example_dataset(
    store_path: str | os.PathLike[str],
    order: Sequence[np.ndarray],
    start_step: int = 0,
    *,
    world_size: int,
    budget_tokens: int,
) -> Dataset:
    """The steps from `start_step`, packed and distributed, as a data set whose rows `streaming_split` assigns
    to the ranks round-robin. A step is planned when it is fetched, identically for each rank.

    Columns: `step`, `rank`, `sizes` (examples per micro-batch) and one list per column of the store. The
    notes on `rayrlhf.data.stream.prompt_dataset` apply here too. Raises `ValueError` if no step is left.
    """
    if not 0 <= start_step < len(order):
        raise ValueError(f"no step from start_step={start_step}")
    blocks = step_ranges(start_step, len(order), world_size, len(order[0]))
    fetch = partial(
        _fetch, os.path.abspath(store_path), order, world_size=world_size, budget_tokens=budget_tokens
    )
    return fetched(blocks, fetch)


def _fetch(
    store_path: str, order: Sequence[np.ndarray], block: pa.Table, *, world_size: int, budget_tokens: int
) -> pa.Table:
    """The rows of a rank for the steps of a block: each column of the store becomes a list per step."""
    [(first, last, rank)] = zip(*block.to_pydict().values(), strict=True)
    store = ExampleStore.open(store_path)
    plans = plan_steps(
        order, store.num_tokens, world_size=world_size, budget_tokens=budget_tokens, start=first, stop=last
    )
    packs = [plan.ranks[rank] for plan in plans]
    row_ids = pa.array([[row for pack in step for row in pack] for step in packs], pa.list_(pa.int64()))
    rows = store.take(row_ids.flatten().to_pylist())
    fetched = pa.table(
        {
            "step": pa.array(range(first, last), pa.int64()),
            "rank": pa.array([rank] * (last - first), pa.int64()),
            "sizes": pa.array([[len(pack) for pack in step] for step in packs], pa.list_(pa.int32())),
        }
    )
    for name in rows.column_names:
        values = rows.column(name).combine_chunks()
        fetched = fetched.append_column(name, pa.ListArray.from_arrays(_offsets(row_ids), values))
    return fetched


def _offsets(lists: pa.ListArray) -> pa.Array:
    lengths = lists.value_lengths().to_pylist()
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return pa.array(ends, pa.int32())


def iter_examples(
    shard: DataIterator, rank: int, start_step: int = 0
) -> Iterator[tuple[int, list[list[Example]]]]:
    """On a worker: its micro-batches of each step, as (step, examples per micro-batch); a padding batch is
    empty.

    Raises `AssertionError` if Ray Data has not followed the plan.
    """
    batches: Iterable[Any] = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2)
    for step, batch in enumerate(batches, start=start_step):
        found = batch.column("step").to_pylist(), batch.column("rank").to_pylist()
        assert found == ([step], [rank]), f"rank {rank} at step {step}: got (step, rank) {found}"
        sizes = batch.column("sizes").to_pylist()[0]
        examples = iter(examples_of(_unnested(batch.drop_columns(["step", "rank", "sizes"]))))
        yield step, [[next(examples) for _ in range(size)] for size in sizes]


def _unnested(row: pa.Table) -> pa.Table:
    return pa.table({name: row.column(name).combine_chunks().flatten() for name in row.column_names})
