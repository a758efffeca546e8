"""Which prompt goes to which worker at which step, and the Ray Data stream that brings it there.

The plan is pure and known from the start: it depends on the number of rows, the batch size and the seed, not
on how many workers there are or when the run was interrupted. Ray Data carries it out, and the workers check
that it did.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rayrlhf.data.store import PromptStore, prompts_of
from rayrlhf.samples import Prompt

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

# Fetching only copies rows out of a mapped file. It asks for no CPU, so that workers which take them all
# cannot keep their own prompts from coming; since nothing else limits tasks without a CPU, their number is
# limited here.
FETCH_TASKS = 2
MAX_BLOCKS = 4096  # each is an object of its own in the cluster, so a long run has several steps in one


def prompt_plan(
    num_rows: int, prompts_per_step: int, num_steps: int, world_size: int, seed: int, shuffle: bool = True
) -> np.ndarray:
    """Row ids [num_steps, world_size, prompts_per_step / world_size], int64.

    Every epoch is a permutation of all rows from `default_rng([seed, epoch])`, or the order of the store
    without `shuffle`; steps run on across its end. Where a step spans two epochs, the rows that it has
    already are put off to later in the new epoch, so that no row comes twice within a step (unless the store
    has fewer rows than a step takes). Rank r holds the slots r·n … r·n + n - 1 of a step, so another number
    of workers gets the same steps, and a longer run begins with the steps of a shorter one. Raises
    `ValueError` for an empty store and a step that does not divide by the workers.
    """
    if num_rows < 1:
        raise ValueError("a plan needs at least one row")
    if prompts_per_step < 1 or prompts_per_step % world_size:
        raise ValueError(f"prompts_per_step={prompts_per_step} does not divide by {world_size} workers")
    total = num_steps * prompts_per_step
    plan = np.empty(total, dtype=np.int64)
    filled, epoch = 0, 0
    while filled < total:
        rows = np.random.default_rng([seed, epoch]).permutation(num_rows) if shuffle else np.arange(num_rows)
        carried = filled % prompts_per_step  # how much of the step the last epoch has filled
        if carried and num_rows >= prompts_per_step:
            rows = _put_off(rows, plan[filled - carried : filled], prompts_per_step - carried)
        count = min(num_rows, total - filled)
        plan[filled : filled + count] = rows[:count]
        filled, epoch = filled + count, epoch + 1
    return plan.reshape(num_steps, world_size, prompts_per_step // world_size)


def _put_off(rows: np.ndarray, taken: np.ndarray, needed: int) -> np.ndarray:
    """Moves the rows in `taken` behind the first `needed` others; the order is kept otherwise."""
    first = np.flatnonzero(~np.isin(rows, taken))[:needed]
    return np.concatenate([rows[first], np.delete(rows, first)])


def prompt_dataset(store_path: str | os.PathLike[str], plan: np.ndarray, start_step: int = 0) -> Dataset:
    """The plan from `start_step` on, as a data set whose blocks `streaming_split` hands to the ranks in turn.

    Columns: `step`, `rank`, `slot` (0 … prompts_per_step - 1, the same prompt's slot for any number of
    workers) and those of the store. The store must be readable where the tasks run. Give it to a trainer as a
    function, which Ray Train calls whenever it starts a worker group, so that a restart begins at its
    checkpoint's step; and with `DataConfig(execution_options=ExecutionOptions(preserve_order=True))`, since
    Ray Train drops the option that the data set carries. Raises `ValueError` where no step is left.
    """
    num_steps, world_size, _ = plan.shape
    if not 0 <= start_step < num_steps:
        raise ValueError(f"start_step={start_step} of a plan with {num_steps} steps")
    steps_per_block = -(-(num_steps - start_step) * world_size // MAX_BLOCKS)
    blocks = [
        _plan_block(plan, range(step, min(step + steps_per_block, num_steps)), rank)
        for step in range(start_step, num_steps, steps_per_block)
        for rank in range(world_size)
    ]
    return fetched(blocks, partial(_fetch, os.path.abspath(store_path)))


def fetched(blocks: list[pa.Table], fetch: Callable[[pa.Table], pa.Table]) -> Dataset:
    """The blocks of a plan in their order, each made by `fetch` into what the plan is about."""
    import ray.data

    from rayrlhf.data.sources import ordered_and_quiet

    with ordered_and_quiet():
        return ray.data.from_arrow(blocks).map_batches(
            fetch,
            batch_size=None,  # a block in, a block out: the split must see the blocks of the plan
            batch_format="pyarrow",
            num_cpus=0,
            concurrency=FETCH_TASKS,
        )


def _plan_block(plan: np.ndarray, steps: range, rank: int) -> pa.Table:
    per_rank = plan.shape[2]
    return pa.table(
        {
            "step": pa.array(np.repeat(np.arange(steps.start, steps.stop, dtype=np.int64), per_rank)),
            "rank": pa.array(np.full(len(steps) * per_rank, rank, dtype=np.int64)),
            "slot": pa.array(
                np.tile(np.arange(rank * per_rank, (rank + 1) * per_rank, dtype=np.int64), len(steps))
            ),
            "row_id": pa.array(plan[steps.start : steps.stop, rank].reshape(-1)),
        }
    )


def _fetch(store_path: str, block: pa.Table) -> pa.Table:
    rows = PromptStore.open(store_path).take(block.column("row_id").to_pylist())
    for name in ("step", "rank", "slot"):
        rows = rows.append_column(name, block.column(name))
    return rows


def iter_prompts(
    shard: DataIterator, rank: int, per_rank: int, start_step: int = 0
) -> Iterator[tuple[int, list[Prompt]]]:
    """On a worker: its prompts of each step, in slot order, as (step, prompts).

    Raises `AssertionError` when Ray Data has not followed the plan: training on would use other prompts than
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
