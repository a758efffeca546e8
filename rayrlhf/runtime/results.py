"""Return values of a training loop, for the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """Result of a completed loop, for the summary. Evaluations are empty without held-out rows."""

    before: dict[str, Any]  # the evaluation before the first step: metrics, rows
    after: dict[str, Any]
    best: dict[str, Any]  # step and number of the best evaluation
    steps: int
    seconds_per_phase: dict[str, float]
    seconds_total: float
    export: str | None  # folder


@dataclass(frozen=True)
class Stopped:
    """The loop ended by a failure that would recur after a restart."""

    reason: str
