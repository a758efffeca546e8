"""The order in which a supervised run takes its rows, by the way in which its steps are given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice

import numpy as np

from rayrlhf.config.train import SupervisedTrainConfig
from rayrlhf.data.batch_plan import RowOrder, epoch_order
from rayrlhf.data.packed_order import MAX_ROWS, PackedOrder
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.step_packing import Packs, counted_steps, filling_sizes, packed_steps

LOOK_AHEAD_ROWS = 128  # with steps of tokens, at least; with few rows, the last gap of a micro-batch is large
LOOK_AHEAD_PACKS = 4  # … or as many rows as make these micro-batches

StepOrder = RowOrder | PackedOrder


def step_order(train: SupervisedTrainConfig, num_tokens: np.ndarray, seed: int, shuffle: bool) -> StepOrder:
    """The rows of every step of a run. Pure: the same for the same arguments.

    `num_tokens` [rows]: what each row has for the micro-batches. With `train.samples_per_step` alone, the
    order is independent of these. Raises `DataError` for more rows than an order that packs may have.
    """
    if train.order_depends_on:
        _check_rows(train, num_tokens)
    if train.tokens_per_step is not None:
        return PackedOrder.of(_steps_of_tokens(train, num_tokens, seed, shuffle))
    order = RowOrder(
        len(num_tokens), train.rows_per_step, train.num_rows_read(len(num_tokens)), seed, shuffle
    )
    if not train.fill_micro_batches:
        return order
    return PackedOrder.of(_filled(order, num_tokens, train.max_tokens_per_micro_batch, train.num_workers))


def can_fill(train: SupervisedTrainConfig, num_tokens: np.ndarray) -> bool:
    """Whether `train.fill_micro_batches` can fill steps of so many samples without bias."""
    unit = train.max_tokens_per_micro_batch * train.num_workers
    return filling_sizes(float(num_tokens.mean()), float(num_tokens.std()), train.rows_per_step, unit)


def look_ahead(num_tokens: np.ndarray, budget_tokens: int) -> int:
    """Rows among which those of a micro-batch are chosen, where steps are given by tokens."""
    return max(LOOK_AHEAD_ROWS, round(LOOK_AHEAD_PACKS * budget_tokens / float(num_tokens.mean())))


def _check_rows(train: SupervisedTrainConfig, num_tokens: np.ndarray) -> None:
    if train.num_steps is not None and train.tokens_per_step is not None:
        rows = train.num_steps * round(train.tokens_per_step / float(num_tokens.mean()))
    else:
        rows = train.num_rows_read(len(num_tokens))
    if rows > MAX_ROWS:
        raise DataError(
            f"the run reads about {rows} rows; an order that fills micro-batches has at most {MAX_ROWS}. "
            "Fix: lower train.num_steps or train.num_epochs, or give train.samples_per_step without "
            "train.fill_micro_batches"
        )


def _steps_of_tokens(
    train: SupervisedTrainConfig, num_tokens: np.ndarray, seed: int, shuffle: bool
) -> Iterator[tuple[list[int], Packs | None]]:
    assert train.tokens_per_step is not None
    budget_tokens = train.max_tokens_per_micro_batch
    packs_per_step = train.tokens_per_step // budget_tokens
    rows_read = None if train.num_steps else train.num_rows_read(len(num_tokens))
    steps = packed_steps(
        _epochs(len(num_tokens), rows_read, seed, shuffle),
        num_tokens,
        budget_tokens=budget_tokens,
        packs_per_step=packs_per_step,
        look_ahead=look_ahead(num_tokens, budget_tokens),
    )
    for packs in islice(steps, train.num_steps):
        is_whole = len(packs) == packs_per_step  # the rows of others are balanced over the ranks
        yield [row for pack in packs for row in pack], packs if is_whole else None


def _epochs(num_rows: int, total_rows: int | None, seed: int, shuffle: bool) -> Iterator[np.ndarray]:
    """The permutations of the epochs, as many as make `total_rows`; without end if that is None."""
    for epoch in count():
        left = None if total_rows is None else total_rows - epoch * num_rows
        if left is not None and left <= 0:
            return
        yield epoch_order(num_rows, seed, epoch, shuffle)[:left]


def _filled(
    order: RowOrder, num_tokens: np.ndarray, budget_tokens: int, world_size: int
) -> Iterator[tuple[list[int], Packs | None]]:
    """The steps of `order`, with rows exchanged among the whole steps of an epoch so that they pack.

    They are chosen from whole epochs, however many steps the run has, so that a longer one begins with them.
    """
    num_epochs = -(-order.total_rows // order.num_rows)
    of_epochs = _filled_epochs(
        replace(order, total_rows=num_epochs * order.num_rows), num_tokens, budget_tokens, world_size
    )
    for step, (rows, packs) in zip(range(len(order)), of_epochs, strict=False):
        size = min(order.samples_per_step, order.total_rows - step * order.samples_per_step)
        yield (rows, packs) if size == len(rows) else (rows[:size], None)


def _filled_epochs(
    order: RowOrder, num_tokens: np.ndarray, budget_tokens: int, world_size: int
) -> Iterator[tuple[list[int], Packs | None]]:
    step, per_step = 0, order.samples_per_step
    while step < len(order):
        epoch = step * per_step // order.num_rows
        stop = (epoch + 1) * order.num_rows // per_step
        if step < stop:
            yield from counted_steps(
                np.concatenate(order[step:stop]),
                num_tokens,
                samples_per_step=per_step,
                budget_tokens=budget_tokens,
                world_size=world_size,
            )
            step = stop
        else:  # it spans two epochs, or is the last one
            yield order[step].tolist(), None
            step += 1
