"""Mixing sources by probability."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.sources import mixing_order

PARTS = st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 1.0)), min_size=1, max_size=4)


def split_by_source(order: np.ndarray, counts: list[int]) -> list[list[int]]:
    starts = np.cumsum([0, *counts])
    return [
        [int(i - start) for i in order if start <= i < stop]
        for start, stop in zip(starts, starts[1:], strict=False)
    ]


def test_one_source_is_itself() -> None:
    assert mixing_order([3], [0.2], seed=5).tolist() == [0, 1, 2]


@given(PARTS, st.integers(0, 2**31))
def test_each_source_in_its_order_until_one_runs_out(parts: list[tuple[int, float]], seed: int) -> None:
    counts, probabilities = [count for count, _ in parts], [share for _, share in parts]
    order = mixing_order(counts, probabilities, seed)
    taken = split_by_source(order, counts)
    assert sum(map(len, taken)) == len(order)
    assert all(rows == list(range(len(rows))) for rows in taken)
    assert any(len(rows) == count for rows, count in zip(taken, counts, strict=True))
    assert mixing_order(counts, probabilities, seed).tolist() == order.tolist()


def test_proportions_hold_and_need_not_sum_to_one() -> None:
    # 20000 of the first source, at 3 of 4 places: about 26667 rows. The share of the second source is 1/4
    # with a standard deviation of sqrt(0.25 · 0.75 / 26667) = 0.0027.
    order = mixing_order([20_000, 20_000], [6.0, 2.0], seed=0)
    first, second = split_by_source(order, [20_000, 20_000])
    assert len(first) == 20_000
    assert abs(len(second) / len(order) - 0.25) < 4 * 0.0027


def test_the_seed_decides() -> None:
    orders = {tuple(mixing_order([20, 20], [1.0, 1.0], seed)) for seed in range(4)}
    assert len(orders) == 4
