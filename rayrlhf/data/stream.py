"""Ray Data streams that bring the rows of a plan (`batch_plan`) to the workers, step by step.

Two kinds of rows: prompts, of which a rank gets its slots of each step, and examples, of which it gets its
packed micro-batches. Ray Data carries the plan out, and the workers check that it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rayrlhf.data.batch_plan import FixedPlan, PromptPlan, RowOrder, plan_steps
from rayrlhf.data.packed_order import PackedOrder
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.store import ExampleStore, PromptStore, examples_of, prompts_of
from rayrlhf.placement.preload import data_task_options
from rayrlhf.samples import Example, Prompt
from rayrlhf.storage.run_file import RunFile

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

# Fetching only copies rows from a mapped file. It requests no CPU, so that workers which occupy all CPUs
# cannot block their own prompts; since nothing else limits tasks without a CPU, their number is limited here.
FETCH_TASKS = 2
MAX_BLOCKS = 4096  # each is a separate object in the cluster, so a long run has several steps per block
BLOCK_ROWS = 16_384  # … unless they would have more rows than this each: then there are more blocks
BLOCK_BYTES = 64 << 20  # … or would be larger than this
MAX_LONG_BLOCKS = 65_536
MAX_BLOCK_ROWS = 65_536  # of such a run


def prompt_dataset(store: RunFile, plan: PromptPlan | FixedPlan, start_step: int = 0) -> Dataset:
    """The plan from `start_step`, as a data set whose blocks `streaming_split` assigns to ranks round-robin.

    Columns: `step`, `rank`, `slot` (0 … prompts_per_step - 1, a prompt's slot for any number of workers) and
    those of the store. Pass it to a trainer as a
    function, which Ray Train calls whenever it starts a worker group, so that a restart begins at its
    checkpoint's step; and with `DataConfig(execution_options=ExecutionOptions(preserve_order=True))`, since
    Ray Train drops the option of the data set. Raises `ValueError` if no step is left.
    """
    if not 0 <= start_step < len(plan):
        raise ValueError(f"start_step={start_step} of a plan with {len(plan)} steps")
    row_bytes = PromptStore.open(store).row_bytes
    blocks = step_ranges(start_step, len(plan), plan.world_size, plan.prompts_per_step, row_bytes)
    return fetched(blocks, partial(_fetch_prompts, store, plan))


def step_ranges(
    start: int, stop: int, world_size: int, rows_per_step: int, row_bytes: int = 0
) -> list[pa.Table]:
    """The steps in blocks of one rank each, as tables with `first`, `last` (exclusive) and `rank`.

    A block is fetched as a whole, so a longer run first gets more blocks, and only then larger ones. Raises
    `DataError` for a run that is too long for a stream. `row_bytes`: mean size of a row, which is large for
    rows with images.
    """
    num_steps, per_rank = stop - start, -(-rows_per_step // world_size)
    block_rows = min(BLOCK_ROWS, BLOCK_BYTES // max(1, row_bytes))
    per_block = -(-num_steps * world_size // MAX_BLOCKS)
    if per_block * per_rank > block_rows:
        per_block = max(block_rows // per_rank, -(-num_steps * world_size // MAX_LONG_BLOCKS), 1)
    if per_block > 1 and per_block * per_rank > MAX_BLOCK_ROWS:
        raise DataError(
            f"{num_steps} steps of {rows_per_step} rows are more than a stream can hold, "
            f"{MAX_LONG_BLOCKS * MAX_BLOCK_ROWS} rows; lower train.num_steps or train.num_epochs"
        )
    firsts = np.repeat(np.arange(start, stop, per_block, dtype=np.int64), world_size)
    lasts = np.minimum(firsts + per_block, stop)
    ranks = np.tile(np.arange(world_size, dtype=np.int64), len(firsts) // world_size)
    blocks = pa.table({"first": firsts, "last": lasts, "rank": ranks})
    return [blocks.slice(index, 1) for index in range(len(blocks))]


def fetched(blocks: list[pa.Table], fetch: Callable[[pa.Table], pa.Table]) -> Dataset:
    """The blocks of a plan in order, each converted to its rows by `fetch`."""
    import ray.data

    from rayrlhf.data.sources.source import ordered_and_quiet

    with ordered_and_quiet():
        return ray.data.from_arrow(blocks).map_batches(
            fetch,
            batch_size=None,  # one block in, one block out: streaming_split must see the blocks of the plan
            batch_format="pyarrow",
            num_cpus=0,
            concurrency=FETCH_TASKS,
            **data_task_options(),
        )


def _fetch_prompts(store: RunFile, plan: PromptPlan | FixedPlan, block: pa.Table) -> pa.Table:
    """The store's rows for the slots of a rank in the steps of a block."""
    [(first, last, rank)] = zip(*block.to_pydict().values(), strict=True)
    row_ids = plan.rows(first, last)[:, rank]
    num_steps, per_rank = row_ids.shape
    columns = {
        "step": np.repeat(np.arange(first, last, dtype=np.int64), per_rank),
        "rank": np.full(num_steps * per_rank, rank, dtype=np.int64),
        "slot": np.tile(np.arange(rank * per_rank, (rank + 1) * per_rank, dtype=np.int64), num_steps),
    }
    rows = PromptStore.open(store).take(row_ids.reshape(-1).tolist())
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values))
    return rows


def iter_prompts(
    shard: DataIterator, rank: int, per_rank: int, start_step: int = 0
) -> Iterator[tuple[int, list[Prompt]]]:
    """On a worker: its prompts of each step, in slot order, as (step, prompts).

    Raises `AssertionError` if Ray Data has not followed the plan: training would use different prompts from
    an uninterrupted run.
    """
    slots = list(range(rank * per_rank, (rank + 1) * per_rank))
    batches: Iterable[Any] = shard.iter_batches(
        batch_size=per_rank, batch_format="pyarrow", prefetch_batches=1
    )
    for step, batch in enumerate(batches, start=start_step):
        found = {name: batch.column(name).to_pylist() for name in ("step", "rank", "slot")}
        wanted = {"step": [step] * per_rank, "rank": [rank] * per_rank, "slot": slots}
        for name, values in wanted.items():
            assert found[name] == values, (
                f"rank {rank} at step {step}: planned {name} {values}, got {found[name]}"
            )
        yield step, prompts_of(batch)


# One row holds everything that a rank trains on in a step: ranks then have the same number of rows, and Ray
# Data never splits within a step.


def example_dataset(
    store: RunFile,
    order: Sequence[np.ndarray],
    start_step: int = 0,
    *,
    world_size: int,
    budget_tokens: int,
) -> Dataset:
    """The steps from `start_step`, packed and distributed, as a data set whose rows `streaming_split` assigns
    to the ranks round-robin. A step is planned when it is fetched, identically for each rank.

    Columns: `step`, `rank`, `sizes` (examples per micro-batch) and one list per column of the store. The
    notes on `prompt_dataset` apply here too. Raises `ValueError` if no step is left.
    """
    if not 0 <= start_step < len(order):
        raise ValueError(f"no step from start_step={start_step}")
    row_bytes = ExampleStore.open(store).row_bytes
    most_rows = order.most_rows if isinstance(order, RowOrder | PackedOrder) else len(order[0])
    blocks = step_ranges(start_step, len(order), world_size, most_rows, row_bytes)
    fetch = partial(
        _fetch_examples,
        store,
        order,
        world_size=world_size,
        budget_tokens=budget_tokens,
    )
    return fetched(blocks, fetch)


def _fetch_examples(
    file: RunFile, order: Sequence[np.ndarray], block: pa.Table, *, world_size: int, budget_tokens: int
) -> pa.Table:
    """The rows of a rank for the steps of a block: each column of the store becomes a list per step."""
    [(first, last, rank)] = zip(*block.to_pydict().values(), strict=True)
    store = ExampleStore.open(file)
    plans = plan_steps(
        order, store.num_tokens, world_size=world_size, budget_tokens=budget_tokens, start=first, stop=last
    )
    packs = [plan.ranks[rank] for plan in plans]
    row_ids = pa.array([[row for pack in step for row in pack] for step in packs], pa.list_(pa.int64()))
    rows = store.take(row_ids.flatten().to_pylist())
    table = pa.table(
        {
            "step": pa.array(range(first, last), pa.int64()),
            "rank": pa.array([rank] * (last - first), pa.int64()),
            "sizes": pa.array([[len(pack) for pack in step] for step in packs], pa.list_(pa.int32())),
        }
    )
    for name in rows.column_names:
        values = rows.column(name).combine_chunks()
        table = table.append_column(name, pa.ListArray.from_arrays(_offsets(row_ids), values))
    return table


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
