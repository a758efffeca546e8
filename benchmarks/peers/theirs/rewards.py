"""Trivial rewards, called by both sides: ours with `responses`, TRL with `completions`."""

from __future__ import annotations

import asyncio


def variety(completions=(), responses=(), **_columns):
    """Distinct characters of each response, as a share of 64: differs within groups, so advantages are not
    0."""
    return [len(set(text)) / 64 for text in responses or completions]


async def slow_variety(responses, latency, **_columns):
    """The same after `latency` seconds (a column of the rows), as from a judge behind a network."""
    await asyncio.sleep(max(latency))
    return variety(responses=responses)
