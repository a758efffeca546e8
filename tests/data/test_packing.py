"""Micro-batches under a token budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.packing import micro_batches, micro_batches_of_groups, rows_of_group, split_even

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


def test_groups_are_packed_by_the_rows_that_they_take() -> None:
    # Budget 20. The first group takes 6 + 3 · 2 = 12 rows for 24 tokens, the second 8 and the third 4 + 5.
    lengths, groups = [8, 8, 8, 9, 9, 9], [[0, 1, 2], [3], [4, 5]]
    assert rows_of_group([8, 8, 8], 6) == 12
    assert micro_batches_of_groups(lengths, groups, [6, 0, 7], 21) == [[0, 1, 2, 3], [4, 5]]


def test_a_group_over_the_budget_is_split_with_its_prefix_in_each_part() -> None:
    # 5 + 4 · 3 = 17 rows; three of the four fit in 5 + 3 · 3 = 14.
    assert micro_batches_of_groups([8, 8, 8, 8], [[0, 1, 2, 3]], [5], 14) == [[0, 1, 2], [3]]


@given(
    st.lists(
        st.tuples(st.integers(0, BUDGET - 1), st.lists(st.integers(1, BUDGET), min_size=1, max_size=6)),
        max_size=8,
    )
)
def test_groups_of_any_size(made: list[tuple[int, list[int]]]) -> None:
    lengths: list[int] = []
    groups: list[list[int]] = []
    for shared, own in made:
        groups.append(list(range(len(lengths), len(lengths) + len(own))))
        lengths += [min(BUDGET, shared + n) for n in own]
    shared_of = [
        min(shared, *(lengths[i] - 1 for i in group)) for (shared, _), group in zip(made, groups, strict=True)
    ]
    packs = micro_batches_of_groups(lengths, groups, shared_of, BUDGET)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    for pack in packs:
        rows = 0
        of_pack = [group_of[i] for i in pack]
        for number in set(of_pack):
            members = [i for i in pack if group_of[i] == number]
            first = of_pack.index(number)
            assert of_pack[first : first + len(members)] == [number] * len(members), "next to each other"
            rows += rows_of_group([lengths[i] for i in members], shared_of[number])
        assert rows <= BUDGET
    for number, group in enumerate(groups):
        if rows_of_group([lengths[i] for i in group], shared_of[number]) <= BUDGET:
            assert sum(bool(set(group) & set(pack)) for pack in packs) == 1, "in one micro-batch"
