"""From the workers to the driver: a small actor that queues what rank 0 reports until the driver's sinks
take it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """One thing worth telling: a phase that began, a finished step, an evaluation, rollouts to keep."""

    kind: str  # "phase" | "step" | "eval" | "rollouts" | "warning" | "note"
    step: int
    text: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


class Board:
    """An async actor, one per run."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.arrived = asyncio.Event()

    async def ping(self) -> bool:
        """The board doubles as the run's lease: it dies with the driver, and the reaper notices."""
        return True

    async def post(self, report: Report) -> None:
        self.reports.append(report)
        self.arrived.set()

    async def take(self, timeout_seconds: float) -> list[Report]:
        """Everything posted since the last call; waits up to the timeout for the first."""
        try:
            await asyncio.wait_for(self.arrived.wait(), timeout_seconds)
        except TimeoutError:
            return []
        taken, self.reports = self.reports, []
        self.arrived.clear()
        return taken
