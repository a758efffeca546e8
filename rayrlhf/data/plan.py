"""Which samples make up which micro-batch of which step on which worker. Pure, and known from the start.

Lengths are known once the data are prepared, so samples are packed and balanced before anything is trained,
and what a step learns depends neither on the number of workers nor on how its samples are packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rayrlhf.data.balance import balanced_partition
from rayrlhf.data.packing import micro_batches
from rayrlhf.data.stream import prompt_plan

MicroBatches = list[list[int]]  # row ids; an empty micro-batch is a filler


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: the micro-batches of every rank, equally many on each (ZeRO-3 would otherwise wait
    for ever).
    """

    ranks: tuple[MicroBatches, ...]


def row_order(
    num_rows: int, samples_per_step: int, total_rows: int, seed: int, shuffle: bool = True
) -> list[np.ndarray]:
    """The row ids of each step: epochs run on across steps, and the last step takes what is left of
    `total_rows`.
    """
    num_steps = -(-total_rows // samples_per_step)
    rows = prompt_plan(num_rows, samples_per_step, num_steps, 1, seed, shuffle).reshape(-1)[:total_rows]
    return [rows[start : start + samples_per_step] for start in range(0, total_rows, samples_per_step)]


def plan_step(
    rows: Sequence[int] | np.ndarray, num_tokens: np.ndarray, *, world_size: int, budget_tokens: int
) -> StepPlan:
    """Shares the rows of a step over the ranks by their tokens, and packs each share into micro-batches.

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
) -> Iterator[StepPlan]:
    """The plans of the steps from `start` on."""
    for rows in order[start:]:
        yield plan_step(rows, num_tokens, world_size=world_size, budget_tokens=budget_tokens)


def each_once(rows: np.ndarray, rows_per_step: int) -> list[np.ndarray]:
    """The order of a pass in which nothing is learnt: an evaluation, a reference's log-probabilities."""
    return [rows[start : start + rows_per_step] for start in range(0, len(rows), rows_per_step)]


def fill_of(plan: StepPlan, num_tokens: np.ndarray, budget_tokens: int) -> float:
    """Tokens as a share of the room in the micro-batches that are not fillers."""
    packs = [pack for rank in plan.ranks for pack in rank if pack]
    return sum(int(num_tokens[row]) for pack in packs for row in pack) / max(1, len(packs) * budget_tokens)
