"""Other rows' responses for KTO."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.rows.mismatch import derangement
from rayrlhf.data.rows.row import DataError


@given(groups=st.lists(st.integers(0, 5), min_size=2, max_size=40), seed=st.integers(0, 2**32 - 1))
def test_every_row_gets_another_one_of_another_prompt_where_there_is_one(
    groups: list[int], seed: int
) -> None:
    found = derangement(np.array(groups), np.random.default_rng(seed)).tolist()
    assert all(item != partner for item, partner in enumerate(found))
    largest = max(groups.count(group) for group in groups)
    if largest < len(groups):
        assert all(groups[item] != groups[partner] for item, partner in enumerate(found))
    if largest <= len(groups) / 2 or largest == len(groups):
        assert sorted(found) == list(range(len(groups))), "every response serves once"
    assert found == derangement(np.array(groups), np.random.default_rng(seed)).tolist()


def test_partners_are_random() -> None:
    groups = np.arange(50)
    first, second = (derangement(groups, np.random.default_rng(seed)).tolist() for seed in (0, 1))
    assert first != second


def test_a_single_row_has_no_partner() -> None:
    with pytest.raises(DataError, match="at least 2 rows"):
        derangement(np.array([0]), np.random.default_rng(0))
