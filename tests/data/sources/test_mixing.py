"""Mixing sources by probability."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.rows.row import DataError
from rayrlhf.data.sources.mixing import mixing_order


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_a_mixture_repeats_nothing_and_ends_where_a_source_does(counts, seed, data):
    weights = data.draw(st.lists(st.floats(0.05, 5), min_size=len(counts), max_size=len(counts)))
    order = mixing_order(counts, weights, seed).tolist()
    assert order == mixing_order(counts, weights, seed).tolist()
    assert len(set(order)) == len(order)
    starts = [sum(counts[:source]) for source in range(len(counts))]
    taken = []
    for start, count in zip(starts, counts, strict=True):
        rows = [row for row in order if start <= row < start + count]
        assert rows == list(range(start, start + len(rows))), "each source in its own order, from its start"
        taken.append(len(rows))
    assert sum(taken) == len(order)
    assert any(used == count for used, count in zip(taken, counts, strict=True))


def test_a_single_source_is_taken_whole():
    assert mixing_order([5], [0.3], 0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("weights", [[0.2, 0.8], [1, 4]])
def test_the_shares_are_those_asked_for(weights):
    order = mixing_order([20_000, 20_000], weights, 7)
    # The second source runs out after about 20000 / 0.8 samples; 4 standard deviations of a share are 0.0101.
    assert len(order) == pytest.approx(25_000, rel=0.02)
    assert np.mean(order < 20_000) == pytest.approx(0.2, abs=0.0101)


def test_another_seed_mixes_otherwise():
    assert mixing_order([50, 50], [1, 1], 0).tolist() != mixing_order([50, 50], [1, 1], 1).tolist()


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_a_mixture_until_all_are_through_gives_every_row(counts, seed):
    weights = [1.0 + source for source in range(len(counts))]
    order = mixing_order(counts, weights, seed, "all_exhausted").tolist()
    assert set(order) == set(range(sum(counts)))
    assert order[-1] not in order[:-1], "it ends with the last row that comes for the first time"
    first = mixing_order(counts, weights, seed, "first_exhausted").tolist()
    assert order[: len(first)] == first
    for source, count in enumerate(counts):
        start = sum(counts[:source])
        rows = [row - start for row in order if start <= row < start + count]
        assert rows == [place % count for place in range(len(rows))], "begins again when it is through"


def test_19_a_mixture_that_would_not_end_is_refused() -> None:
    with pytest.raises(DataError, match=r"source 1 with 5 rows has a share of 1e-12; .*first_exhausted"):
        mixing_order([5, 5], [1.0, 1e-12], 0, "all_exhausted")
    assert len(mixing_order([5, 5], [1.0, 0.01], 0, "all_exhausted")) < 5000
