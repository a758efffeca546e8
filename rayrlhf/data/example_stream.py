"""The Ray Data stream that carries a plan out: a worker receives its packed micro-batches, step by step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayrlhf.data.example_store import ExampleStore, examples_of
from rayrlhf.data.plan import StepPlan
from rayrlhf.data.stream import MAX_BLOCKS, fetched
from rayrlhf.samples import Example

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

# One row is all that a rank trains on in a step: ranks then have equally many rows, and no split of Ray
# Data's falls inside a step.


def example_dataset(
    store_path: str | os.PathLike[str], plans: Iterable[StepPlan], start_step: int = 0
) -> Dataset:
    """The plans, of the steps from `start_step` on, as a data set whose rows `streaming_split` hands to the
    ranks in turn.

    Columns: `step`, `rank`, `sizes` (examples per micro-batch) and one list per column of the store. What is
    said of `rayrlhf.data.stream.prompt_dataset` holds here too. Raises `ValueError` where no step is left.
    """
    steps = list(plans)
    if not steps:
        raise ValueError(f"no step from start_step={start_step} on")
    world_size = len(steps[0].ranks)
    steps_per_block = -(-len(steps) * world_size // MAX_BLOCKS)
    blocks = [
        _plan_block(steps[first : first + steps_per_block], start_step + first, rank)
        for first in range(0, len(steps), steps_per_block)
        for rank in range(world_size)
    ]
    return fetched(blocks, partial(_fetch, os.path.abspath(store_path)))


def _plan_block(plans: list[StepPlan], first_step: int, rank: int) -> pa.Table:
    packs = [plan.ranks[rank] for plan in plans]
    return pa.table(
        {
            "step": pa.array(range(first_step, first_step + len(plans)), pa.int64()),
            "rank": pa.array([rank] * len(plans), pa.int64()),
            "sizes": pa.array([[len(pack) for pack in step] for step in packs], pa.list_(pa.int32())),
            "row_ids": pa.array(
                [[row for pack in step for row in pack] for step in packs], pa.list_(pa.int64())
            ),
        }
    )


def _fetch(store_path: str, block: pa.Table) -> pa.Table:
    """The store's rows in the place of their ids: each of its columns becomes a list per step."""
    row_ids = block.column("row_ids").combine_chunks()
    rows = ExampleStore.open(store_path).take(row_ids.flatten().to_pylist())
    fetched = block.drop_columns(["row_ids"])
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
    """On a worker: its micro-batches of each step, as (step, examples per micro-batch), empty for a filler.

    Raises `AssertionError` when Ray Data has not followed the plan.
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
