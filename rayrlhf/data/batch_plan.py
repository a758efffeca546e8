"""Batch plan of supervised training: samples of every micro-batch, step and worker. Pure, known in advance.

Lengths are known once the data are prepared, so samples are packed and balanced before training, and the
result of a step depends neither on the number of workers nor on the packing of its samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from rayrlhf.data.balance import balanced_partition
from rayrlhf.data.packing import micro_batches
from rayrlhf.data.stream import PromptPlan

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
    for rows in order[start : len(order) if stop is None else stop]:
        yield plan_step(rows, num_tokens, world_size=world_size, budget_tokens=budget_tokens)


def each_once(rows: np.ndarray, rows_per_step: int) -> list[np.ndarray]:
    """The order of a pass without training: an evaluation, log-probabilities of a reference model."""
    return [rows[start : start + rows_per_step] for start in range(0, len(rows), rows_per_step)]


def fill_of(plan: StepPlan, num_tokens: np.ndarray, budget_tokens: int) -> float:
    """Tokens as a fraction of the capacity of the micro-batches that are not padding batches."""
    packs = [pack for rank in plan.ranks for pack in rank if pack]
    return sum(int(num_tokens[row]) for pack in packs for row in pack) / max(1, len(packs) * budget_tokens)
