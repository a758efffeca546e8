"""Orders whose steps pack: rows once per epoch, full micro-batches, no bias, and the same after a resume."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config.train import SupervisedTrainConfig
from rayrlhf.data.batch_plan import RowOrder, epoch_order, fill_of, plan_steps
from rayrlhf.data.packed_order import PackedOrder
from rayrlhf.data.rows.row import DataError
from rayrlhf.data.step_order import StepOrder, can_fill, look_ahead, step_order
from rayrlhf.data.step_packing import filling_sizes, packed_steps


def train(budget: int = 128, **changes: Any) -> SupervisedTrainConfig:
    return SupervisedTrainConfig.model_validate({"max_tokens_per_micro_batch": budget, **changes})


def ordered(lengths: Any, seed: Any = 5, **changes: Any) -> StepOrder:
    return step_order(train(**changes), np.asarray(lengths), seed, shuffle=True)


def log_normal(rows: int) -> np.ndarray:
    return np.clip(np.random.default_rng(0).lognormal(5.0, 0.8, rows), 20, 900).astype(np.int64)


def steps_of(order: StepOrder) -> list[list[int]]:
    return [rows.tolist() for rows in order]


LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=60)


@given(lengths=LENGTHS, packs=st.integers(1, 4), epochs=st.sampled_from([0.5, 1.0, 2.0, 3.4]))
def test_by_tokens_every_row_comes_once_per_epoch(lengths: list[int], packs: int, epochs: float) -> None:
    order = ordered(lengths, tokens_per_step=128 * packs, num_epochs=epochs)
    rows = [row for step in steps_of(order) for row in step]
    total = max(1, round(epochs * len(lengths)))
    assert len(rows) == total == order.rows_before(len(order))
    for start in range(0, total, len(lengths)):
        part = rows[start : start + len(lengths)]
        assert sorted(part) == sorted(epoch_order(len(lengths), 5, start // len(lengths), True)[: len(part)])
    assert all(max(Counter(step).values()) == 1 for step in steps_of(order))
    assert order.distinct().tolist() == sorted(set(rows))


@given(
    lengths=LENGTHS,
    world_size=st.sampled_from([1, 2, 4]),
    by=st.sampled_from([{"tokens_per_step": 512}, {"samples_per_step": 8, "fill_micro_batches": True}]),
)
def test_plans_keep_the_budget_on_any_number_of_ranks(
    lengths: list[int], world_size: int, by: dict[str, Any]
) -> None:
    tokens = np.asarray(lengths)
    order = ordered(lengths, num_workers=world_size, num_epochs=2, **by)
    plans = list(plan_steps(order, tokens, world_size=world_size, budget_tokens=128))
    for rows, plan in zip(order, plans, strict=True):
        packs = [pack for rank in plan.ranks for pack in rank]
        assert sorted(row for pack in packs for row in pack) == sorted(rows.tolist())
        assert all(sum(lengths[row] for row in pack) <= 128 for pack in packs)
        assert len(plan.ranks) == world_size and len({len(rank) for rank in plan.ranks}) == 1
    later = plan_steps(order, tokens, world_size=world_size, budget_tokens=128, start=len(order) // 2)
    assert list(later) == plans[len(order) // 2 :]


def test_by_tokens_the_rows_of_a_step_do_not_depend_on_the_ranks_and_a_longer_run_begins_alike() -> None:
    lengths = log_normal(500)
    one, four = (
        ordered(lengths, budget=1024, tokens_per_step=4096, num_workers=workers, num_steps=30)
        for workers in (1, 4)
    )
    assert steps_of(one) == steps_of(four)
    longer = ordered(lengths, budget=1024, tokens_per_step=4096, num_steps=70)
    assert (len(one), len(longer)) == (30, 70)
    assert steps_of(longer)[:30] == steps_of(one)
    assert steps_of(ordered(lengths, budget=1024, tokens_per_step=4096, num_steps=30)) == steps_of(one)
    assert steps_of(ordered(lengths, 6, budget=1024, tokens_per_step=4096, num_steps=30)) != steps_of(one)


@given(lengths=LENGTHS, packs=st.integers(1, 3), window=st.integers(1, 12))
def test_no_row_is_overtaken_from_outside_the_window_and_none_starves(
    lengths: list[int], packs: int, window: int
) -> None:
    order = np.random.default_rng(1).permutation(len(lengths))
    steps = packed_steps(
        iter([order]), np.asarray(lengths), budget_tokens=128, packs_per_step=packs, look_ahead=window
    )
    place = {row: position for position, row in enumerate(order.tolist())}
    micro_batches = [[place[row] for row in pack] for step in steps for pack in step]
    waiting = set(range(len(lengths)))
    entered: dict[int, int] = {}
    for number, pack in enumerate(micro_batches):
        oldest = min(waiting)
        assert oldest in pack  # … and so every row in the window is taken within as many micro-batches
        assert all(position < max(oldest, *pack[: index + 1]) + window for index, position in enumerate(pack))
        for position in waiting:
            if position < oldest + window:
                entered.setdefault(position, number)
        waiting -= set(pack)
        assert all(number - entered.get(position, number) < window for position in pack)
    assert not waiting


def test_rows_wait_a_few_steps_at_most_on_usual_lengths() -> None:
    lengths = log_normal(4000)
    order = ordered(lengths, budget=1024, tokens_per_step=8192)
    place = np.argsort(epoch_order(4000, 5, 0, True))
    firsts = np.maximum.accumulate([place[rows].max() for rows in order])  # places seen up to each step
    waits = [step - np.searchsorted(firsts, place[rows]) for step, rows in enumerate(order)]
    assert max(wait.max() for wait in waits) <= 4
    assert look_ahead(lengths, 1024) == 128


@pytest.mark.parametrize("budget", [1024, 4096])
@pytest.mark.parametrize("world_size", [1, 4])
def test_steps_of_tokens_are_97_percent_full(budget: int, world_size: int) -> None:
    lengths = log_normal(8000)
    size = {"tokens_per_step": 2 * world_size * budget, "num_workers": world_size}
    order = ordered(lengths, budget=budget, **size)
    plans = list(plan_steps(order, lengths, world_size=world_size, budget_tokens=budget))[:-1]
    fills = [fill_of(plan, lengths, budget) for plan in plans]
    assert np.mean(fills) >= 0.97 and min(fills) >= 0.93
    assert {len(rank) for plan in plans for rank in plan.ranks} == {2}  # and no padding batches
    # Not all short rows in one step and all long ones in another: as random steps of as many rows.
    means = np.array([lengths[rows].mean() for rows in order][:-1])
    assert means.std() < 1.2 * lengths.std() / np.sqrt(len(lengths) / len(order))


@pytest.mark.parametrize(
    ("budget", "world_size", "samples"), [(1024, 1, 64), (1024, 4, 256), (4096, 1, 256), (4096, 4, 2048)]
)
def test_steps_of_samples_are_97_percent_full_without_bias(
    budget: int, world_size: int, samples: int
) -> None:
    lengths = log_normal(20480)
    size = {"samples_per_step": samples, "fill_micro_batches": True, "num_workers": world_size}
    order = ordered(lengths, budget=budget, **size)
    assert {len(rows) for rows in order[:-1]} == {samples}
    plans = list(plan_steps(order, lengths, world_size=world_size, budget_tokens=budget))[:-1]
    assert np.mean([fill_of(plan, lengths, budget) for plan in plans]) >= 0.97
    slots = sum(len(rank) for plan in plans for rank in plan.ranks)
    assert sum(lengths[rows].sum() for rows in order[:-1]) >= 0.96 * slots * budget  # with padding batches
    means = np.array([lengths[rows].mean() for rows in order[:-1]])
    natural = lengths.std() / np.sqrt(samples)
    assert means.std() < 1.1 * natural and np.abs(means - lengths.mean()).max() < 3 * natural


def test_by_samples_a_longer_run_begins_alike() -> None:
    lengths = log_normal(1000)
    by_samples = {"budget": 1024, "samples_per_step": 64, "fill_micro_batches": True}
    whole = ordered(lengths, num_steps=40, **by_samples)  # two and a half epochs
    exchanged = RowOrder(1000, 64, 40 * 64, 5)
    assert any(one != other.tolist() for one, other in zip(steps_of(whole), exchanged, strict=True))
    for num_steps in (1, 2, 7, 16, 31):
        assert steps_of(ordered(lengths, num_steps=num_steps, **by_samples)) == steps_of(whole)[:num_steps]


def test_steps_of_samples_that_cannot_be_filled_keep_their_order() -> None:
    lengths = log_normal(4000)  # 16 of 200 tokens: a fifth of what four ranks hold
    size = {"samples_per_step": 16, "num_workers": 4}
    assert not can_fill(train(4096, **size), lengths)
    filled = ordered(lengths, budget=4096, fill_micro_batches=True, **size)
    assert steps_of(filled) == steps_of(ordered(lengths, budget=4096, **size))


def test_which_sizes_can_be_filled() -> None:
    # 100 rows of 50: 5000 tokens, whose deviation is 10 · std.
    assert filling_sizes(50, 0, 100, 5100)  # 98 % full as they are
    assert not filling_sizes(50, 10, 100, 4000)  # 3976 or 7800: ten deviations below or 28 above
    assert filling_sizes(50, 30, 100, 512)  # 4580 to 5089, at 97.5 % to 99.4 %: within two of 300
    assert not filling_sizes(50, 50, 100, 100_000)  # no micro-batch can be full


@given(lengths=LENGTHS, samples=st.integers(1, 9), epochs=st.sampled_from([0.5, 1.0, 2.4]))
def test_exchanging_rows_changes_no_number_and_no_epoch(
    lengths: list[int], samples: int, epochs: float
) -> None:
    size = {"samples_per_step": samples, "num_epochs": epochs}
    filled, plain = ordered(lengths, fill_micro_batches=True, **size), ordered(lengths, **size)
    assert isinstance(plain, RowOrder)
    assert list(map(len, filled)) == list(map(len, plain))
    ours, theirs = (np.concatenate(steps_of(order)) for order in (filled, plain))
    for start in range(0, len(theirs), len(lengths)):
        part = slice(start, start + len(lengths))
        if len(theirs[part]) == len(lengths):
            assert sorted(ours[part].tolist()) == sorted(theirs[part].tolist())
        else:  # the run ends within this epoch: its rows may be some that a longer run exchanged for others
            assert len(set(ours[part].tolist())) == len(theirs[part])
    if samples <= len(lengths):
        assert all(max(Counter(step).values()) == 1 for step in steps_of(filled))


@pytest.mark.parametrize("samples", [24, 64])
def test_exchanged_rows_are_a_few_steps_early_or_late(samples: int) -> None:
    lengths = log_normal(100 * samples)
    size = {"samples_per_step": samples, "budget": 1024}
    filled, plain = ordered(lengths, fill_micro_batches=True, **size), ordered(lengths, **size)
    turn = {row: step for step, rows in enumerate(plain) for row in rows.tolist()}
    late = [step - turn[row] for step, rows in enumerate(filled) for row in rows.tolist()]
    assert -4 <= min(late) < 0 < max(late) <= 5


def test_without_a_shuffle_rows_stay_near_their_place() -> None:
    lengths = log_normal(1000)
    order = step_order(train(1024, tokens_per_step=4096), lengths, 0, shuffle=False)
    moved = np.concatenate(steps_of(order)) - np.arange(len(lengths))
    assert 0 < np.abs(moved).max() < 2 * look_ahead(lengths, 1024)


def test_small_data_make_a_step_per_epoch() -> None:
    order = ordered([10, 20, 30], tokens_per_step=512, num_steps=4)
    assert [sorted(step) for step in steps_of(order)] == [[0, 1, 2]] * 4


def test_an_order_in_a_file_is_sent_as_its_path(tmp_path: Path) -> None:
    order = PackedOrder.of([([4, 0, 2], [[4, 2], [0]]), ([1, 3], None)])
    kept = order.saved(tmp_path / "data")
    assert len(pickle.dumps(kept)) < 500
    for same in (order, kept, pickle.loads(pickle.dumps(kept)), pickle.loads(pickle.dumps(order))):
        assert steps_of(same) == [[4, 2, 0], [1, 3]]
        assert [pack.tolist() for pack in same.packs(0) or []] == [[4, 2], [0]]
        assert same.packs(1) is None
        assert (same.rows_before(1), same.rows_before(2), same.most_rows, len(same)) == (3, 5, 3, 2)
        assert same[-1].tolist() == [1, 3]
    with pytest.raises(IndexError, match="step 2 of 2"):
        order[2]


def test_an_order_that_cannot_be_kept_is_an_error_at_once() -> None:
    for size in (
        {"tokens_per_step": 128, "num_steps": 4_000_000},
        {"tokens_per_step": 128, "num_epochs": 1e7},
        {"samples_per_step": 64, "fill_micro_batches": True, "num_steps": 2_000_000},
    ):
        with pytest.raises(DataError, match=r"reads about \d+ rows; .* at most 67108864"):
            ordered([5] * 8, **size)
