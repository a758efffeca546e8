"""What a reward source is asked, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rayrlhf.samples import Prompt

# Its square still fits float32, in which advantages are computed.
LARGEST_REWARD = 1e18


class RewardError(ValueError):
    """A reward source that cannot be used, or that breaks the contract."""


@dataclass(frozen=True)
class ScoreItem:
    """One sample as a source sees it."""

    prompt: Prompt
    response: str
    token_ids: list[int]  # of prompt and response
    turn: int = 0  # counts requests; a retry has the next one: whose turn it is among several addresses


@dataclass(frozen=True)
class Failure:
    """A sample that a source could not score."""

    reason: str


def checked_reward(value: Any) -> float | Failure:
    """What a source gave for one sample, held to the contract: a finite number, no text and no null."""
    if isinstance(value, Failure):
        return value
    if value is None or not isinstance(value, int | float):
        return Failure(f"returned {value!r:.80}, which is no number")
    if not abs(value) <= LARGEST_REWARD:  # NaN too
        # An integer may have thousands of digits, too many for float() and for a message.
        is_finite = isinstance(value, int) or math.isfinite(value)
        what = f"beyond {LARGEST_REWARD:g}" if is_finite else "not finite"
        return Failure(
            f"returned {value if abs(value) < 1e30 or not is_finite else 'a number'}, which is {what}"
        )
    return float(value)
