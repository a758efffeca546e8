"""Mixes sources by probability. Pure: counts in, an order of rows out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rayrlhf.data.rows.row import DataError

MAX_REPEATS = 1000  # a mixture longer than its rows by this factor is considered a mistake
MixingStops = Literal["first_exhausted", "all_exhausted"]


def mixing_order(
    counts: Sequence[int], probabilities: Sequence[float], seed: int, stops: MixingStops = "first_exhausted"
) -> np.ndarray:
    """Order of the rows of mixed sources: indices into their concatenation, [rows] int64.

    The source of each position is sampled with the given probabilities (they need not sum to 1) from
    `default_rng(seed)`, and its next row is used. With `first_exhausted` the mixture ends when a source has
    no row left, so that the proportions hold and nothing repeats; the other sources' rest is not used.
    With `all_exhausted` a source restarts when it is exhausted, and the mixture ends with the last row that
    occurs for the first time; the proportions hold and every row is used. Raises `DataError` if that would
    take more than `MAX_REPEATS` times the rows.
    """
    weights = np.asarray(probabilities, dtype=np.float64)
    rng = np.random.default_rng(seed)
    sampled = rng.choice(len(counts), size=sum(counts) + 1, p=weights / weights.sum())
    if stops == "all_exhausted":
        _check_length(counts, weights / weights.sum())
        while np.any(np.bincount(sampled, minlength=len(counts)) < counts):
            more = rng.choice(len(counts), size=len(sampled), p=weights / weights.sum())
            sampled = np.concatenate([sampled, more])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    order = np.empty(len(sampled), dtype=np.int64)
    first_empty, all_through = len(sampled), 0
    for source, count in enumerate(counts):
        places = np.flatnonzero(sampled == source)
        order[places] = starts[source] + np.arange(len(places)) % max(count, 1)
        if len(places) > count:
            first_empty = min(first_empty, int(places[count]))
        if count and len(places) >= count:
            all_through = max(all_through, int(places[count - 1]) + 1)
    return order[: first_empty if stops == "first_exhausted" else all_through]


def _check_length(counts: Sequence[int], shares: np.ndarray) -> None:
    """A source of n rows and probability p is exhausted after n/p rows of the mixture, on average."""
    expected = max(count / share for count, share in zip(counts, shares.tolist(), strict=True))
    if expected <= MAX_REPEATS * sum(counts):
        return
    worst = max(range(len(counts)), key=lambda index: counts[index] / shares[index])
    raise DataError(
        f"data.mixing_stops=all_exhausted would take about {expected:.0f} rows, since source {worst} with "
        f"{counts[worst]} rows has a share of {shares[worst]:.2g}; raise its probability, or set "
        "data.mixing_stops=first_exhausted"
    )
