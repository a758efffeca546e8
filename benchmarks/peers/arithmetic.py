"""The numbers of the tables: rates, ratios of pairs, shares of the machine's matrix-product limit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

FLOPS_PER_WEIGHT = 6  # a multiplication and an addition, in the forward and in both backward products


class Spread(NamedTuple):
    """A median and the range of what it is of."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """
    >>> spread([1.0, 4.0, 2.0])
    Spread(median=2.0, low=1.0, high=4.0)
    """
    if not values:
        raise ValueError("no values: a spread needs at least one")
    return Spread(statistics.median(values), min(values), max(values))


def steady_rate(amounts: Sequence[float], seconds: Sequence[float], *, warmup: int) -> float:
    """Amount per second over all steps but the first `warmup`: the sum over the sum, not a mean of rates.

    >>> steady_rate([10, 10, 30], [100.0, 1.0, 3.0], warmup=1)
    10.0
    """
    if len(amounts) != len(seconds):
        raise ValueError(f"{len(amounts)} amounts and {len(seconds)} durations: wanted one each per step")
    if len(amounts) <= warmup:
        raise ValueError(f"{len(amounts)} steps, of which {warmup} are warm-up: none is left to measure")
    return sum(amounts[warmup:]) / sum(seconds[warmup:])


def speedup(ours: Sequence[float], peer: Sequence[float], *, higher_is_better: bool) -> Spread:
    """How many times as fast ours is: the ratio of the medians, with the range of the ratios of the pairs.

    `ours[i]` and `peer[i]` were measured one after the other.

    >>> speedup([20.0, 30.0, 22.0], [10.0, 10.0, 10.0], higher_is_better=True)
    Spread(median=2.2, low=2.0, high=3.0)
    >>> speedup([2.0], [3.0], higher_is_better=False)
    Spread(median=1.5, low=1.5, high=1.5)
    """
    if len(ours) != len(peer):
        raise ValueError(f"{len(ours)} of ours and {len(peer)} of the peer's: wanted pairs")
    over, under = (ours, peer) if higher_is_better else (peer, ours)
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return Spread(statistics.median(over) / statistics.median(under), min(ratios), max(ratios))


def share_of_limit(num_weights: int, tokens_per_second: float, limit_flops: float) -> float:
    """The products of training as a share of what the machine's products reach, in [0, 1].

    `num_weights` are those of matrix products; attention's own products and recomputation do not count.

    >>> share_of_limit(100, 10.0, 12_000.0)
    0.5
    """
    if limit_flops <= 0:
        raise ValueError(f"limit_flops={limit_flops}, wanted more than 0")
    return FLOPS_PER_WEIGHT * num_weights * tokens_per_second / limit_flops
