"""Assignment of prompts to workers and steps, and the Ray Data stream that delivers them.

The plan is pure and known in advance: it depends on the number of rows, the batch size and the seed, not on
the number of workers or on interruptions of the run. Ray Data executes it, and the workers verify that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.store import PromptStore, prompts_of
from rayrlhf.samples import Prompt

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

# Fetching only copies rows from a mapped file. It requests no CPU, so that workers which occupy all CPUs
# cannot block their own prompts; since nothing else limits tasks without a CPU, their number is limited here.
FETCH_TASKS = 2
MAX_BLOCKS = 4096  # each is a separate object in the cluster, so a long run has several steps per block
BLOCK_ROWS = 16_384  # … unless they would have more rows than this each: then there are more blocks
MAX_LONG_BLOCKS = 65_536
MAX_BLOCK_ROWS = 65_536  # of such a run


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(num_rows)
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


@dataclass(frozen=True)
class PromptPlan:
    """The rows of every step. Computed on access, not stored.

    Every epoch is a permutation of all rows from `default_rng([seed, epoch])`, or the order of the store
    without `shuffle`; steps continue across its end. If a step spans two epochs, rows that it already
    contains are deferred to later in the new epoch, so that no row occurs twice within a step (unless the
    store has fewer rows than a step). Rank r has the slots r·n … r·n + n - 1 of a step, so the steps are the
    same for any number of workers, and a longer run begins with the steps of a shorter one. Raises
    `ValueError` for an empty store and a step size that is not divisible by the number of workers.
    """

    num_rows: int
    prompts_per_step: int
    num_steps: int
    world_size: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError("a plan needs at least one row")
        if self.prompts_per_step < 1 or self.prompts_per_step % self.world_size:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} is not divisible by {self.world_size} workers"
            )

    def __len__(self) -> int:
        return self.num_steps

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Row ids of the steps start … stop - 1, [steps, world_size, prompts_per_step / world_size]."""
        per_step = self.prompts_per_step
        first, last = start * per_step, stop * per_step
        found = np.empty(last - first, dtype=np.int64)
        filled, epoch = first, first // self.num_rows
        order = self._order(epoch)
        while filled < last:
            offset = filled - epoch * self.num_rows
            count = min(self.num_rows - offset, last - filled)
            found[filled - first : filled - first + count] = order[offset : offset + count]
            filled += count
            if filled < last:
                epoch += 1
                order = self._following(order, epoch)
        return found.reshape(stop - start, self.world_size, per_step // self.world_size)

    def _order(self, epoch: int) -> np.ndarray:
        """The order of an epoch, computed from the last one before it that is independent of its predecessor.

        The end of an epoch equals its permutation's if the store has twice the rows of a step: at most a
        step's rows at its beginning are moved. Otherwise an epoch that begins with a step is near.
        """
        if self.num_rows >= 2 * self.prompts_per_step:
            known = max(0, epoch - 1)
        else:
            every = self.prompts_per_step // math.gcd(self.num_rows, self.prompts_per_step)
            known = epoch - epoch % every
        order = _epoch_order(self.num_rows, self.seed, known, self.shuffle)
        for later in range(known + 1, epoch + 1):
            order = self._following(order, later)
        return order

    def _following(self, before: np.ndarray, epoch: int) -> np.ndarray:
        """The order of an epoch, given the order of the previous one."""
        order = _epoch_order(self.num_rows, self.seed, epoch, self.shuffle)
        carried = epoch * self.num_rows % self.prompts_per_step  # of the step that spans both
        if not carried or self.num_rows < self.prompts_per_step:
            return order
        return _defer(order, before[-carried:], self.prompts_per_step - carried)


@dataclass(frozen=True)
class FixedPlan:
    """An explicit plan: row ids [num_steps, world_size, prompts per rank]."""

    row_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def world_size(self) -> int:
        return self.row_ids.shape[1]

    @property
    def prompts_per_step(self) -> int:
        return self.row_ids.shape[1] * self.row_ids.shape[2]

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.row_ids[start:stop]


def _defer(rows: np.ndarray, taken: np.ndarray, needed: int) -> np.ndarray:
    """Moves the rows in `taken` after the first `needed` others; the order is unchanged otherwise.

    The affected rows are among the first `needed + len(taken)`: the rest is not moved.
    """
    head = rows[: needed + len(taken)]
    is_taken = np.isin(head, taken)
    first = np.flatnonzero(~is_taken)[:needed]
    return np.concatenate([head[first], np.delete(head, first), rows[len(head) :]])


def prompt_dataset(
    store_path: str | os.PathLike[str], plan: PromptPlan | FixedPlan, start_step: int = 0
) -> Dataset:
    """The plan from `start_step`, as a data set whose blocks `streaming_split` assigns to ranks round-robin.

    Columns: `step`, `rank`, `slot` (0 … prompts_per_step - 1, a prompt's slot for any number of workers) and
    those of the store. The store must be readable on all nodes that run the tasks. Pass it to a trainer as a
    function, which Ray Train calls whenever it starts a worker group, so that a restart begins at its
    checkpoint's step; and with `DataConfig(execution_options=ExecutionOptions(preserve_order=True))`, since
    Ray Train drops the option of the data set. Raises `ValueError` if no step is left.
    """
    if not 0 <= start_step < len(plan):
        raise ValueError(f"start_step={start_step} of a plan with {len(plan)} steps")
    blocks = step_ranges(start_step, len(plan), plan.world_size, plan.prompts_per_step)
    return fetched(blocks, partial(_fetch, os.path.abspath(store_path), plan))


def step_ranges(start: int, stop: int, world_size: int, rows_per_step: int) -> list[pa.Table]:
    """The steps in blocks of one rank each, as tables with `first`, `last` (exclusive) and `rank`.

    A block is fetched as a whole, so a longer run first gets more blocks, and only then larger ones. Raises
    `DataError` for a run that is too long for a stream.
    """
    num_steps, per_rank = stop - start, -(-rows_per_step // world_size)
    per_block = -(-num_steps * world_size // MAX_BLOCKS)
    if per_block * per_rank > BLOCK_ROWS:
        per_block = max(BLOCK_ROWS // per_rank, -(-num_steps * world_size // MAX_LONG_BLOCKS), 1)
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
        )


def _fetch(store_path: str, plan: PromptPlan | FixedPlan, block: pa.Table) -> pa.Table:
    """The store's rows for the slots of a rank in the steps of a block."""
    [(first, last, rank)] = zip(*block.to_pydict().values(), strict=True)
    row_ids = plan.rows(first, last)[:, rank]
    num_steps, per_rank = row_ids.shape
    columns = {
        "step": np.repeat(np.arange(first, last, dtype=np.int64), per_rank),
        "rank": np.full(num_steps * per_rank, rank, dtype=np.int64),
        "slot": np.tile(np.arange(rank * per_rank, (rank + 1) * per_rank, dtype=np.int64), num_steps),
    }
    rows = PromptStore.open(store_path).take(row_ids.reshape(-1).tolist())
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
