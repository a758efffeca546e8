"""The bootstrap interval where it can be worked out by hand, and how often it covers the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.observe.statistics import bootstrap_interval

values = st.lists(st.floats(-10, 10), min_size=1, max_size=20)


def test_what_does_not_vary_has_no_width() -> None:
    assert bootstrap_interval([2.5]) == (2.5, 2.5)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


@pytest.mark.parametrize("resamples", [1, 499, 500, 501, 1000, 1001])
def test_every_resample_is_drawn(resamples: int) -> None:
    value = 1000.0 + resamples
    assert bootstrap_interval([value] * 3, level=1.0, resamples=resamples) == (value, value)


@pytest.mark.parametrize(
    "level, interval",
    [
        (0.95, (0.0, 1.0)),
        (0.60, (0.0, 1.0)),
        (0.40, (0.5, 0.5)),
    ],
)
def test_two_values_by_hand(level: float, interval: tuple[float, float]) -> None:
    # Means of two draws from {0, 1} are 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4. With tails of 2.5 %
    # or 20 % the quantiles lie in the quarters; with tails of 30 % in the half between.
    assert bootstrap_interval([0.0, 1.0], level=level) == interval


def test_many_values_are_near_the_normal_interval() -> None:
    # 60 of 100 ones: the mean 0.6 has the standard error sqrt(0.6 · 0.4 / 100) = 0.049, times 1.96 = 0.096.
    low, high = bootstrap_interval([1.0] * 60 + [0.0] * 40)
    assert (low, high) == pytest.approx((0.504, 0.696), abs=0.011)
    narrow = bootstrap_interval([1.0] * 60 + [0.0] * 40, level=0.5)  # times 0.674 = 0.033
    assert narrow == pytest.approx((0.567, 0.633), abs=0.011)


def test_it_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [
        bootstrap_interval(rng.normal(3.0, 2.0, 60).tolist(), resamples=400, seed=i) for i in range(300)
    ]
    covered = np.mean([low <= 3.0 <= high for low, high in intervals])
    # 0.95, a little less for 60 samples; over 300 draws give or take 3 · sqrt(0.95 · 0.05 / 300) = 0.038.
    assert 0.90 <= covered <= 0.985


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sample=values, shift=st.floats(-5, 5))
def test_it_moves_with_the_sample_and_stays_inside(sample: list[float], shift: float) -> None:
    low, high = bootstrap_interval(sample, resamples=501)
    assert min(sample) - 1e-9 <= low <= high <= max(sample) + 1e-9
    moved = bootstrap_interval([value + shift for value in sample], resamples=501)
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_the_same_sample_has_the_same_interval() -> None:
    sample = np.random.default_rng(1).normal(size=50).tolist()
    assert bootstrap_interval(sample) == bootstrap_interval(sample)
    assert bootstrap_interval(sample) != bootstrap_interval(sample, seed=1)


def test_no_value_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])
