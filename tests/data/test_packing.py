import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.packing import micro_batches, split_even


def test_best_fit_decreasing_by_hand():
    # Budget 10, longest first: 7 opens A, 6 opens B, 4 fits only B (4 free, A has 3), 3 fills A, 2 opens C.
    assert micro_batches([6, 3, 7, 2, 4], 10) == [[0, 4], [1, 2], [3]]


def test_the_fullest_that_fits_is_taken():
    # 6 opens A (4 free), 5 opens B (5 free); 4 goes to A, which it fills, though B has room as well.
    assert micro_batches([5, 6, 4], 10) == [[0], [1, 2]]


def test_edges():
    assert micro_batches([], 10) == []
    assert micro_batches([10], 10) == [[0]]
    assert micro_batches([1, 1, 1], 3) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="sequence 1 has 11 tokens, more than the micro-batch budget of 10"):
        micro_batches([1, 11], 10)
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        micro_batches([0], 10)


@given(budget=st.integers(1, 50), data=st.data())
def test_every_sequence_once_within_the_budget_and_few_batches(budget, data):
    lengths = data.draw(st.lists(st.integers(1, budget), max_size=40))
    batches = micro_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in batch) for batch in batches]
    assert all(0 < load <= budget for load in loads)
    # No two can be merged: any-fit packing leaves at most one batch at most half full.
    assert all(a + b > budget for i, a in enumerate(loads) for b in loads[i + 1 :])
    assert batches == micro_batches(list(lengths), budget)


def test_split_even_by_hand():
    assert split_even(["a", "b", "c", "d", "e"], 3) == [["a", "b"], ["c", "d"], ["e"]]
    assert split_even([1, 2], 3) == [[1], [2], []]
    assert split_even((1, 2), 1) == [[1, 2]]
    with pytest.raises(ValueError, match="wanted at least 1"):
        split_even([1], 0)


@given(items=st.lists(st.integers()), parts=st.integers(1, 12))
def test_split_even_keeps_everything_in_order(items, parts):
    split = split_even(items, parts)
    assert len(split) == parts
    assert [item for part in split for item in part] == items
    sizes = [len(part) for part in split]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
