"""From the workers to the driver: a small actor that queues what rank 0 reports until the driver's sinks
take it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

MAX_REPORTS = 10_000


@dataclass(frozen=True)
class Report:
    """One thing worth telling: a phase that began, a finished step, an evaluation, rollouts to keep."""

    kind: str  # "phase" | "step" | "eval" | "rollouts" | "event" | "warning"
    step: int
    text: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


class Board:
    """An async actor, one per run. It holds at most `max_reports`; what it drops is counted."""

    def __init__(self, max_reports: int = MAX_REPORTS) -> None:
        self.reports: list[Report] = []
        self.max_reports = max_reports
        self.num_dropped = 0
        self.phase = Report("phase", 0, "start")  # the newest
        self.arrived = asyncio.Event()

    async def ping(self) -> bool:
        """The board doubles as the run's lease: it dies with the driver, and the reaper notices."""
        return True

    async def post(self, report: Report) -> None:
        if report.kind == "phase":
            self.phase = report
        self.reports.append(report)
        if len(self.reports) > self.max_reports:
            self._drop_one()
        self.arrived.set()

    async def fail(self, what_failed: str, what_is_done: str) -> None:
        """A failure, put together with the phase in which it happened."""
        when = f"after step {self.phase.step}, in {self.phase.text}"
        await self.post(Report("warning", self.phase.step, f"{what_failed} {when}; {what_is_done}"))

    def _drop_one(self) -> None:
        """The driver does not take reports: the oldest phase goes first, it is news for a moment only."""
        oldest = next((i for i, report in enumerate(self.reports) if report.kind == "phase"), 0)
        del self.reports[oldest]
        self.num_dropped += 1

    async def take(self, timeout_seconds: float) -> list[Report]:
        """Everything posted since the last call; waits up to the timeout for the first."""
        try:
            await asyncio.wait_for(self.arrived.wait(), timeout_seconds)
        except TimeoutError:
            return []
        taken, self.reports = self.reports, []
        self.arrived.clear()
        if self.num_dropped:
            lost = f"{self.num_dropped} reports were dropped: nothing took them from the board for long"
            taken.append(Report("warning", taken[-1].step, lost))
            self.num_dropped = 0
        return taken
