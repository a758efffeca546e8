"""Running moments: by hand, against numpy, and however the values are split over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayrlhf.reward.normalize import RunningMoments, batch_moments


def on_one_rank(values: Tensor) -> Tensor:
    return values


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1)


def over_ranks(shares: Sequence[Tensor]) -> RunningMoments:
    """What every rank computes when each has its share: the two sums over ranks are added up beforehand."""
    none = torch.zeros(2, shares[0].shape[1])
    first = sum((_recorded(share, 0, none) for share in shares), none)
    second = sum((_recorded(share, 1, first) for share in shares), none)
    totals = iter([first, second])
    return batch_moments(shares[0], lambda _: next(totals))


def _recorded(share: Tensor, which: int, first_total: Tensor) -> Tensor:
    """What a rank puts into sum number `which`, when the total of the first is known."""
    given: list[Tensor] = []

    def record(local: Tensor) -> Tensor:
        given.append(local)
        return first_total if which == 1 else local

    batch_moments(share, record)
    return given[which]


def test_by_hand() -> None:
    # 1, 2, 6: mean 9/3 = 3, squared deviations 4 + 1 + 9 = 14.
    moments = batch_moments(column(1.0, 2.0, 6.0), on_one_rank)
    assert (moments.count.item(), moments.mean.item(), moments.m2.item()) == (3.0, 3.0, 14.0)
    # 7 more: mean 16/4 = 4, squared deviations 9 + 4 + 4 + 9 = 26.
    moments = moments.merged(batch_moments(column(7.0), on_one_rank))
    assert (moments.count.item(), moments.mean.item(), moments.m2.item()) == (4.0, 4.0, 26.0)
    # Population variance 26/4 = 6.5: 4 + sqrt(6.5) lies one deviation above the mean.
    normalized = moments.normalized(column(4.0, 4.0 + 6.5**0.5))
    assert normalized.flatten().tolist() == pytest.approx([0.0, 1.0], abs=1e-8)


def test_nothing_seen_leaves_values_as_they_are() -> None:
    nothing = RunningMoments.none_yet(1)
    assert nothing.normalized(column(3.0, -2.0)).flatten().tolist() == [3.0, -2.0]
    merged = nothing.merged(batch_moments(torch.zeros(0, 1), on_one_rank))
    assert (merged.count.item(), merged.mean.item(), merged.m2.item()) == (0.0, 0.0, 0.0)


def test_a_constant_reward_becomes_zero() -> None:
    moments = RunningMoments.none_yet(1)
    for _ in range(10):
        moments = moments.merged(batch_moments(column(0.1, 0.1, 0.1), on_one_rank))
    assert moments.normalized(column(0.1)).item() == pytest.approx(0.0, abs=1e-9)


def test_quantities_do_not_mix() -> None:
    values = torch.tensor([[1.0, 100.0], [3.0, 100.0]], dtype=torch.float64)
    moments = batch_moments(values, on_one_rank)
    assert moments.mean.tolist() == [2.0, 100.0] and moments.m2.tolist() == [2.0, 0.0]


def test_a_large_offset_costs_no_precision() -> None:
    """Summing squares would lose all digits here: (1e9)² has none left for a variance of 1/4."""
    moments = RunningMoments.none_yet(1)
    for _ in range(1000):
        moments = moments.merged(batch_moments(column(1e9, 1e9 + 1), on_one_rank))
    assert (moments.m2 / moments.count).item() == pytest.approx(0.25, rel=1e-9)


values_lists = st.lists(
    st.floats(min_value=-1e6, max_value=1e6, allow_nan=False, width=64), min_size=1, max_size=60
)


@given(values=values_lists, data=st.data())
def test_any_split_over_batches_and_ranks_gives_what_numpy_gives(
    values: list[float], data: st.DataObject
) -> None:
    moments = RunningMoments.none_yet(1)
    start = 0
    while start < len(values):
        stop = data.draw(st.integers(start + 1, len(values)), label="end of the batch")
        batch = values[start:stop]
        cuts = sorted(data.draw(st.lists(st.integers(0, len(batch)), min_size=2, max_size=2), label="ranks"))
        shares = [column(*batch[a:b]) for a, b in zip([0, *cuts], [*cuts, len(batch)], strict=True)]
        moments = moments.merged(over_ranks(shares))
        start = stop
    seen = np.array(values, dtype=np.float64)
    scale = max(1.0, float(np.abs(seen).max()))
    assert moments.count.item() == len(values)
    assert moments.mean.item() == pytest.approx(seen.mean(), rel=1e-9, abs=1e-12 * scale)
    assert (moments.m2 / moments.count).item() == pytest.approx(seen.var(), rel=1e-9, abs=1e-12 * scale**2)
    expected = (seen - seen.mean()) / np.sqrt(seen.var() + 1e-8)
    found = moments.normalized(column(*values)).flatten().numpy()
    # Rounding of x - mean, about 1e-16 of the scale, is divided by a deviation of at least 1e-4.
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-10 * scale)
