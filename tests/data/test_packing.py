"""Micro-batches under a token budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.packing import micro_batches, split_even

BUDGET = 50


def test_the_longest_come_first_and_fill_up() -> None:
    # Budget 8. 5 opens a; 4 does not fit and opens b; 3 fills a (5 + 3); 3 goes to b (4 + 3), 1 fills it.
    assert micro_batches([5, 4, 3, 3, 1], 8) == [[0, 2], [1, 3, 4]]


def test_the_fullest_that_fits_is_taken_not_the_first() -> None:
    # Budget 10. 7 opens a (3 free), 5 opens b (5 free), 4 goes to b (1 free); 1 fits both, and fills b.
    assert micro_batches([7, 5, 4, 1], 10) == [[0], [1, 2, 3]]


def test_micro_batches_and_their_members_are_ordered_by_index() -> None:
    assert micro_batches([1, 9, 2, 8], 10) == [[0, 1], [2, 3]]


def test_nothing_gives_nothing() -> None:
    assert micro_batches([], 8) == []


@pytest.mark.parametrize(
    "lengths, message",
    [([3, 9], "sequence 1 has 9 tokens, more than the micro-batch budget of 8"), ([0], "sequence 0 has 0")],
)
def test_what_cannot_be_packed_is_named(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro_batches(lengths, 8)


@given(st.lists(st.integers(1, BUDGET), max_size=60))
def test_every_sequence_once_and_never_over_the_budget(lengths: list[int]) -> None:
    batches = micro_batches(lengths, BUDGET)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in batch) for batch in batches]
    assert max(totals, default=0) <= BUDGET
    # A micro-batch is opened only by what fits into no other, so no two of them could be one.
    assert all(a + b > BUDGET for i, a in enumerate(totals) for b in totals[:i])
    assert micro_batches(lengths, BUDGET) == batches


def test_split_even_puts_the_longer_parts_first() -> None:
    assert split_even("abcdefg", 3) == [["a", "b", "c"], ["d", "e"], ["f", "g"]]
    assert split_even([1, 2], 3) == [[1], [2], []]
    with pytest.raises(ValueError, match="0 parts"):
        split_even([1], 0)


@given(st.lists(st.integers()), st.integers(1, 9))
def test_split_even_keeps_order_and_evens_out(items: list[int], parts: int) -> None:
    split = split_even(items, parts)
    assert [item for part in split for item in part] == items
    sizes = [len(part) for part in split]
    assert len(sizes) == parts and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
