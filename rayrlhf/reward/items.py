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


class NotRetryable(RewardError):
    """A request that must not be repeated: it would do the same harm again."""


def last_message(error: BaseException) -> str:
    """One line. What a replica has raised comes in Ray's wrapping, with a traceback; a `RewardError` of ours
    is a sentence already.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, RewardError):
        return str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@dataclass(frozen=True)
class ScoreItem:
    """One sample as a source sees it."""

    prompt: Prompt
    response: str
    token_ids: list[int]  # of prompt and response
    turn: int = 0  # counts requests; a retry has the next one: whose turn it is among several addresses


@dataclass(frozen=True)
class Failure:
    """A sample that a source could not score. `final`: it need not be asked again."""

    reason: str
    final: bool = False


@dataclass(frozen=True)
class Unverified:
    """The reward of an answer that could not be verified, which counts as wrong, and why."""

    reward: float
    reason: str


def checked_reward(value: Any) -> float | Failure:
    """What a source gave for one sample, held to the contract: a finite number, no text and no null."""
    if isinstance(value, Failure):
        return value
    if isinstance(value, Unverified):
        value = value.reward
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
