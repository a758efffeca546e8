"""Request and result types of reward sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rayrlhf.samples import Prompt

# Its square still fits float32, in which advantages are computed.
LARGEST_REWARD = 1e18


class RewardError(ValueError):
    """A reward source that cannot be used, or that violates the contract."""


def last_message(error: BaseException) -> str:
    """The last line of an error's message. Ray wraps what a replica raised, with a traceback; a `RewardError`
    is already a single sentence.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, RewardError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@dataclass(frozen=True)
class ScoreItem:
    """One sample as a reward source sees it."""

    prompt: Prompt
    response: str
    token_ids: list[int]  # prompt and response
    attempt: int = 0  # request counter, incremented by retries: selects one of several addresses


@dataclass(frozen=True)
class Failure:
    """A sample that a source could not score. `final`: a retry would fail again."""

    reason: str
    final: bool = False


@dataclass(frozen=True)
class Unverified:
    """The reward of an answer that could not be verified, which counts as wrong, and the reason."""

    reward: float
    reason: str


def checked_reward(value: Any) -> float | Failure:
    """The reward of one sample, checked for the contract: a finite number, neither text nor null."""
    if isinstance(value, Failure):
        return value
    if isinstance(value, Unverified):
        value = value.reward
    if value is None or not isinstance(value, int | float):
        return Failure(f"returned {value!r:.80}, which is not a number")
    if not abs(value) <= LARGEST_REWARD:  # also true for NaN
        # An integer may have thousands of digits, too many for float() and for a message.
        is_finite = isinstance(value, int) or math.isfinite(value)
        what = f"beyond {LARGEST_REWARD:g}" if is_finite else "not finite"
        return Failure(
            f"returned {value if abs(value) < 1e30 or not is_finite else 'a number'}, which is {what}"
        )
    return float(value)
