"""Bootstrap intervals and pass@k where they can be worked out by hand, and how often they hold."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrlhf.observe.statistics import bootstrap_interval, pass_at_k

values = st.lists(st.floats(-10, 10), min_size=1, max_size=20)


def test_what_does_not_vary_has_no_width() -> None:
    assert bootstrap_interval([2.5]) == (2.5, 2.5)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


@pytest.mark.parametrize("resamples", [1, 499, 500, 501, 1000, 1001])
def test_every_resample_counts(resamples: int) -> None:
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
    # Means of two samples from {0, 1} are 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4. With tails of 2.5 %
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
    # 0.95, a little less for 60 samples; over 300 repetitions ± 3 · sqrt(0.95 · 0.05 / 300) = 0.038.
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


@pytest.mark.parametrize(
    "num_samples, num_correct, k, expected",
    [
        (4, 1, 1, 1 / 4),  # one answer: the share of right ones
        (4, 1, 2, 1 / 2),  # C(3,2)/C(4,2) = 3/6 of the pairs miss it
        (5, 2, 2, 7 / 10),  # C(3,2)/C(5,2) = 3/10
        (5, 2, 3, 9 / 10),  # C(3,3)/C(5,3) = 1/10
        (5, 2, 4, 1.0),  # only three are wrong
        (5, 0, 5, 0.0),
        (5, 5, 1, 1.0),
        (1, 1, 1, 1.0),
        (1, 0, 1, 0.0),
    ],
)
def test_pass_at_k_by_hand(num_samples: int, num_correct: int, k: int, expected: float) -> None:
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_picks_with_a_right_answer(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            picks = list(combinations(range(num_samples), k))  # answers 0 .. num_correct-1 are right
            share = sum(min(pick) < num_correct for pick in picks) / len(picks)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-12)


@settings(derandomize=True)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_with_many_samples_equals_exact_binomials(numbers: tuple[int, int, int]) -> None:
    num_samples, num_correct, k = numbers
    missed = comb(num_samples - num_correct, k) / comb(num_samples, k)  # of whole numbers, however large
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(1 - missed, abs=1e-9)


def test_pass_at_k_is_unbiased() -> None:
    # Six answers, each right with probability 0.3: the mean estimate for k = 3 is the true 1 - 0.7³ = 0.657.
    # The plain 1 - (w/n)³ of the w wrong ones is biased: E[w³] = np + 3n(n-1)p² + n(n-1)(n-2)p³ at p = 0.7 is
    # 4.2 + 44.1 + 41.16 = 89.46, and 1 - 89.46/216 = 0.58583.
    p, n, k = 0.3, 6, 3
    chances = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(chances)) == pytest.approx(0.657)
    plain = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chances))
    assert plain == pytest.approx(0.58583, abs=1e-5)


@pytest.mark.parametrize("numbers", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_what_cannot_be(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        pass_at_k(*numbers)
