"""The largest differencing method: by hand, against its bounds, against the greedy method, and its speed."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.data import packing
from rayrlhf.data.packing import balanced_partition


def sums_of(sizes: list[int], partition: list[list[int]]) -> list[int]:
    return sorted(sum(sizes[index] for index in part) for part in partition)


def test_two_parts_by_hand() -> None:
    # 8 - 7 = 1; 6 - 5 = 1; 4 - 1 = 3; 3 - 1 = 2. Unwound: 8 + 6 = 14 and 7 + 5 + 4 = 16.
    assert balanced_partition([8, 7, 6, 5, 4], 2) == [[0, 2], [1, 3, 4]]


def test_three_parts_by_hand() -> None:
    # (8,0,0) with (7,0,0): 8 | 0 | 7. (8,7,0) with (6,0,0): 8 | 7 | 6, i.e. excesses 2, 1, 0.
    # (5,0,0) with (4,0,0): 5 | 4 | 0. Then 5 with the 6, 4 with the 7, nothing with the 8: 11, 11, 8.
    assert balanced_partition([8, 7, 6, 5, 4], 3) == [[0], [1, 4], [2, 3]]


def test_fewer_items_than_parts() -> None:
    assert balanced_partition([3, 9], 4) == [[0], [1], [], []]
    assert balanced_partition([], 3) == [[], [], []]


def test_one_part_takes_all() -> None:
    assert balanced_partition([2, 0, 5], 1) == [[0, 1, 2]]


def test_equal_sizes_are_dealt_out() -> None:
    assert [len(part) for part in balanced_partition([7] * 12, 4)] == [3] * 4


def test_errors() -> None:
    with pytest.raises(ValueError, match="0 parts"):
        balanced_partition([1], 0)
    with pytest.raises(ValueError, match="item 1 has the size -2"):
        balanced_partition([1, -2], 2)


@settings(derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 100), max_size=60), parts=st.integers(1, 9), seed=st.integers(0, 2**32 - 1)
)
def test_every_index_once_and_the_order_of_the_input_does_not_matter(
    sizes: list[int], parts: int, seed: int
) -> None:
    partition = balanced_partition(sizes, parts)
    assert len(partition) == parts
    assert sorted(index for part in partition for index in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in partition)
    firsts = [part[0] for part in partition if part]
    assert firsts == sorted(firsts) and all(partition[: len(firsts)])
    sums = sums_of(sizes, partition)
    assert sums[-1] - sums[0] <= max(sizes, default=0)

    order = np.random.default_rng(seed).permutation(len(sizes)).tolist()
    shuffled = [sizes[i] for i in order]
    assert sums_of(shuffled, balanced_partition(shuffled, parts)) == sums
    assert balanced_partition(sizes, parts) == partition


@settings(max_examples=60, derandomize=True)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=7), parts=st.integers(2, 3))
def test_within_the_known_bound_of_the_best_partition(sizes: list[int], parts: int) -> None:
    best = min(
        max(sum(s for s, part in zip(sizes, chosen, strict=True) if part == p) for p in range(parts))
        for chosen in product(range(parts), repeat=len(sizes))
    )
    bound = (
        7 / 6 if parts == 2 else 4 / 3 - 1 / (3 * parts)
    )  # Fischetti & Martello 1987; Michiels et al. 2007
    assert best <= sums_of(sizes, balanced_partition(sizes, parts))[-1] <= bound * best + 1e-9


def longest_first(sizes: list[int], parts: int) -> list[int]:
    """The greedy method: each item, largest first, to the part with the least so far."""
    sums = [0] * parts
    for size in sorted(sizes, reverse=True):
        sums[sums.index(min(sums))] += size
    return sorted(sums)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_evener_than_the_greedy_method(parts: int) -> None:
    rng = np.random.default_rng(0)
    spreads, greedy = [], []
    for _ in range(50):
        sizes = rng.integers(1, 4097, 12 * parts).tolist()
        sums, greedy_sums = sums_of(sizes, balanced_partition(sizes, parts)), longest_first(sizes, parts)
        spreads.append(sums[-1] - sums[0])
        greedy.append(greedy_sums[-1] - greedy_sums[0])
    assert np.mean(spreads) < np.mean(greedy) / 2


def test_the_greedy_method_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """8, 7, 6 to a part each, 5 to that of 6, 4 to that of 7."""
    monkeypatch.setattr(packing, "MOST_MERGED_SUMS", 0)
    assert balanced_partition([8, 7, 6, 5, 4], 3) == [[0], [1, 4], [2, 3]]
    assert balanced_partition([3, 9], 4) == [[0], [1], [], []]


def test_a_huge_step_takes_no_time() -> None:
    """512 workers and 128 samples of each: a step of 1,000 GPUs."""
    sizes = np.random.default_rng(0).integers(1, 4097, 512 * 128).tolist()
    start = time.perf_counter()
    sums = sums_of(sizes, balanced_partition(sizes, 512))
    assert time.perf_counter() - start < 5  # 0.1 s; the rest is for a busy machine
    assert sums[-1] - sums[0] <= 0.001 * sums[0]


def test_a_large_step_takes_no_time() -> None:
    sizes = np.random.default_rng(0).integers(1, 4097, 8192).tolist()
    start = time.perf_counter()
    sums = sums_of(sizes, balanced_partition(sizes, 64))
    assert time.perf_counter() - start < 5  # 0.2 s; the rest is for a busy machine
    assert sums[-1] - sums[0] <= 4
