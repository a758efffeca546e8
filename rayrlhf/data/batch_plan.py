"""Which rows make up which step, and which micro-batch of which worker. Pure, and known from the start.

A plan depends on the number of rows, the rows per step and the seed, not on how many workers there are or
when the run was interrupted. Lengths of examples are known once the data are prepared, so these are packed
and balanced before anything is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import overload

import numpy as np

from rayrlhf.data.packed_order import PackedOrder
from rayrlhf.data.packing import balanced_partition, micro_batches


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
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
        order = epoch_order(self.num_rows, self.seed, known, self.shuffle)
        for later in range(known + 1, epoch + 1):
            order = self._following(order, later)
        return order

    def _following(self, before: np.ndarray, epoch: int) -> np.ndarray:
        """The order of an epoch, given the order of the previous one."""
        order = epoch_order(self.num_rows, self.seed, epoch, self.shuffle)
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


MicroBatches = list[list[int]]  # row ids; an empty micro-batch is a padding batch


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: the micro-batches of every rank, the same number on each (ZeRO-3 would otherwise
    deadlock).
    """

    ranks: tuple[MicroBatches, ...]


@dataclass(frozen=True)
class RowOrder(Sequence[np.ndarray]):
    """The row ids of each step: epochs continue across step boundaries, and the last step has the remainder
    of `total_rows`. Computed on access, not stored.
    """

    num_rows: int
    samples_per_step: int
    total_rows: int
    seed: int
    shuffle: bool = True

    def __len__(self) -> int:
        return -(-self.total_rows // self.samples_per_step)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            assert stride == 1
            return self._steps(start, stop)
        step = index + len(self) if index < 0 else index
        if not 0 <= step < len(self):
            raise IndexError(f"step {index} of {len(self)}")
        return self._steps(step, step + 1)[0]

    def _steps(self, start: int, stop: int) -> list[np.ndarray]:
        plan = PromptPlan(self.num_rows, self.samples_per_step, len(self), 1, self.seed, self.shuffle)
        left = self.total_rows - start * self.samples_per_step  # from the first of these steps
        rows = plan.rows(start, max(start, stop)).reshape(-1)[:left]
        return [rows[i : i + self.samples_per_step] for i in range(0, len(rows), self.samples_per_step)]

    def distinct(self) -> np.ndarray:
        """All row ids that occur, in ascending order."""
        if self.total_rows >= self.num_rows:  # a whole epoch
            return np.arange(self.num_rows)
        return np.unique(np.concatenate(self[:]))

    def rows_before(self, step: int) -> int:
        """Rows of the steps before this one."""
        return min(step * self.samples_per_step, self.total_rows)

    @property
    def most_rows(self) -> int:
        """Rows of the largest step."""
        return self.samples_per_step


def plan_step(
    rows: Sequence[int] | np.ndarray, num_tokens: np.ndarray, *, world_size: int, budget_tokens: int
) -> StepPlan:
    """Balances the rows of a step over the ranks by tokens, and packs each rank's rows into micro-batches.

    `num_tokens` [all rows] are the lengths of the store's rows. Raises `ValueError` for a row longer than the
    budget.
    """
    lengths = [int(num_tokens[row]) for row in rows]
    ranks: list[MicroBatches] = []
    for share in balanced_partition(lengths, world_size):
        packs = micro_batches([lengths[i] for i in share], budget_tokens)
        ranks.append([[int(rows[share[i]]) for i in pack] for pack in packs])
    most = max(map(len, ranks))
    return StepPlan(tuple(packs + [[] for _ in range(most - len(packs))] for packs in ranks))


def dealt(packs: Sequence[np.ndarray], num_tokens: np.ndarray, world_size: int) -> StepPlan:
    """Shares a step's micro-batches out: the same number on each rank, and about the same tokens.

    Largest first, each to the rank with the fewest tokens of those that have room for another one; padding
    batches complete the ranks where the number is not a multiple of `world_size`.
    """
    tokens = [int(num_tokens[pack].sum()) for pack in packs]
    most = -(-len(packs) // world_size)
    ranks: list[MicroBatches] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for index in sorted(range(len(packs)), key=lambda i: (-tokens[i], i)):
        rank = min((r for r in range(world_size) if len(ranks[r]) < most), key=lambda r: (totals[r], r))
        ranks[rank].append(packs[index].tolist())
        totals[rank] += tokens[index]
    return StepPlan(tuple(packs + [[] for _ in range(most - len(packs))] for packs in ranks))


def plan_steps(
    order: Sequence[np.ndarray],
    num_tokens: np.ndarray,
    *,
    world_size: int,
    budget_tokens: int,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[StepPlan]:
    """The plans of the steps from `start` to `stop` (default: the last)."""
    for step, rows in enumerate(order[start : len(order) if stop is None else stop], start):
        packs = order.packs(step) if isinstance(order, PackedOrder) else None
        if packs is not None:
            yield dealt(packs, num_tokens, world_size)
        else:
            yield plan_step(rows, num_tokens, world_size=world_size, budget_tokens=budget_tokens)


def each_once(rows: np.ndarray, rows_per_step: int) -> list[np.ndarray]:
    """The order of a pass without training: an evaluation, log-probabilities of a reference model."""
    return [rows[start : start + rows_per_step] for start in range(0, len(rows), rows_per_step)]


def fill_of(plan: StepPlan, num_tokens: np.ndarray, budget_tokens: int) -> float:
    """Tokens as a fraction of the capacity of the micro-batches that are not padding batches."""
    packs = [pack for rank in plan.ranks for pack in rank if pack]
    return sum(int(num_tokens[row]) for pack in packs for row in pack) / max(1, len(packs) * budget_tokens)
