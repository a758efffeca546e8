"""Estimates for evaluation results, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the (weighted) mean (Efron 1979). A single value gives an interval of
    width 0.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("an interval needs at least one value")
    weight = np.ones_like(sample) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 500):  # in pieces: [500, n] instead of [10000, n] numbers at once
        stop = min(start + 500, resamples)
        picks = rng.integers(0, sample.size, size=(stop - start, sample.size))
        means[start:stop] = (sample * weight)[picks].sum(axis=1) / weight[picks].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` answers to a prompt is right (arXiv 2107.03374).

    1 - C(n-c, k)/C(n, k): of all ways to pick k of the n answers sampled, the share with at least one of the
    c right ones. Computed as 1 - Π_{i=n-c+1..n} (1 - k/i), since the binomials overflow. The estimate over a
    data set is the mean over its prompts. Raises `ValueError` unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"{num_correct} correct of {num_samples} samples; wanted 0 <= correct <= samples")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples; wanted 1 <= k <= samples")
    if num_samples - num_correct < k:  # any k answers hold a right one
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def calibration_error(margins: Sequence[float] | np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of σ(margin) as the probability that the preferred one is better.

    Whichever the model prefers, it says so with confidence max(σ(m), σ(-m)) in [0.5, 1]; it is right where
    m > 0. Over equal bins of the confidence: Σ share of the bin · |share right - mean confidence|
    (arXiv 1706.04599). NaN of nothing.
    """
    margins = np.asarray(margins, dtype=np.float64)
    if margins.size == 0:
        return math.nan
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [
        (which == b).mean() * abs((margins[which == b] > 0).mean() - confidence[which == b].mean())
        for b in np.unique(which)
    ]
    return float(sum(gaps))
