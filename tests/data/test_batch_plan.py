"""Plans of supervised steps: every row once per epoch, shared out and packed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.batch_plan import RowOrder, each_once, fill_of, plan_step, plan_steps


def test_an_epoch_has_every_row_once_and_its_last_step_what_is_left() -> None:
    steps = RowOrder(num_rows=10, samples_per_step=4, total_rows=10, seed=0)
    assert [len(rows) for rows in steps] == [4, 4, 2]
    assert sorted(np.concatenate(steps[:]).tolist()) == list(range(10))


def test_epochs_run_on_across_steps() -> None:
    steps = RowOrder(num_rows=6, samples_per_step=4, total_rows=12, seed=3)
    assert [len(rows) for rows in steps] == [4, 4, 4]
    assert np.bincount(np.concatenate(steps[:])).tolist() == [2] * 6
    assert all(len(set(rows.tolist())) == 4 for rows in steps)  # no row twice within a step


def test_another_seed_has_another_order_and_no_shuffle_that_of_the_file() -> None:
    first, again, other = (np.concatenate(RowOrder(50, 10, 50, seed=seed)[:]).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert np.concatenate(RowOrder(5, 2, 5, seed=1, shuffle=False)[:]).tolist() == [0, 1, 2, 3, 4]


def test_hand_made_step() -> None:
    # Rows 0..4 of 6, 5, 4, 3, 2 tokens for two ranks with room for 8: the heaviest go to different ranks.
    plan = plan_step([0, 1, 2, 3, 4], np.array([6, 5, 4, 3, 2]), world_size=2, budget_tokens=8)
    tokens = [sum([6, 5, 4, 3, 2][row] for pack in rank for row in pack) for rank in plan.ranks]
    assert sorted(tokens) in ([9, 11], [10, 10])
    assert len(plan.ranks[0]) == len(plan.ranks[1])


def test_a_rank_without_rows_gets_padding_batches() -> None:
    plan = plan_step([3], np.array([1, 1, 1, 7]), world_size=3, budget_tokens=8)
    assert sorted(plan.ranks) == [[[]], [[]], [[3]]]


def test_a_row_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="9 tokens"):
        plan_step([0], np.array([9]), world_size=1, budget_tokens=8)


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    world_size=st.integers(1, 4),
    samples_per_step=st.integers(1, 16),
)
def test_properties(lengths: list[int], world_size: int, samples_per_step: int) -> None:
    order = RowOrder(len(lengths), samples_per_step, len(lengths), seed=5)
    plans = list(plan_steps(order, np.array(lengths), world_size=world_size, budget_tokens=128))
    assert len(plans) == len(order)
    for rows, plan in zip(order, plans, strict=True):
        packs = [pack for rank in plan.ranks for pack in rank]
        assert sorted(row for pack in packs for row in pack) == sorted(rows.tolist())
        assert all(sum(lengths[row] for row in pack) <= 128 for pack in packs)
        assert len({len(rank) for rank in plan.ranks}) == 1  # as many micro-batches on every rank
    # A resumed stream is the rest of the whole one.
    later = plan_steps(order, np.array(lengths), world_size=world_size, budget_tokens=128, start=1)
    assert list(later) == plans[1:]
    assert order.distinct().tolist() == list(range(len(lengths)))


def test_log_normal_lengths_fill_97_percent() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(mean=5.5, sigma=0.9, size=2048), 8, 4096).astype(int)
    plans = plan_steps(RowOrder(2048, 512, 2048, 0), lengths, world_size=1, budget_tokens=8192)
    assert np.mean([fill_of(plan, lengths, 8192) for plan in plans]) >= 0.97


def test_each_once() -> None:
    assert [rows.tolist() for rows in each_once(np.array([4, 1, 7]), 2)] == [[4, 1], [7]]
