"""Mixing sources by probability. Pure: counts in, an order of rows out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

MixingStops = Literal["first_exhausted", "all_exhausted"]


def mixing_order(
    counts: Sequence[int], probabilities: Sequence[float], seed: int, stops: MixingStops = "first_exhausted"
) -> np.ndarray:
    """Which row comes at which place when sources are mixed: indices into their concatenation, [rows] int64.

    Each place draws its source with the given probabilities (they need not sum to 1) from
    `default_rng(seed)`, and takes that source's next row. With `first_exhausted` the mixture ends where a
    source has no row left to give, so that the proportions hold and nothing repeats; what the others had left
    is not used. With `all_exhausted` a source begins again when it is through, and the mixture ends with the
    last row that comes for the first time; the proportions hold and every row is used.
    """
    weights = np.asarray(probabilities, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(counts), size=sum(counts) + 1, p=weights / weights.sum())
    if stops == "all_exhausted":
        while np.any(np.bincount(drawn, minlength=len(counts)) < counts):
            more = rng.choice(len(counts), size=len(drawn), p=weights / weights.sum())
            drawn = np.concatenate([drawn, more])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    order = np.empty(len(drawn), dtype=np.int64)
    first_empty, all_through = len(drawn), 0
    for source, count in enumerate(counts):
        places = np.flatnonzero(drawn == source)
        order[places] = starts[source] + np.arange(len(places)) % max(count, 1)
        if len(places) > count:
            first_empty = min(first_empty, int(places[count]))
        if count and len(places) >= count:
            all_through = max(all_through, int(places[count - 1]) + 1)
    return order[: first_empty if stops == "first_exhausted" else all_through]
