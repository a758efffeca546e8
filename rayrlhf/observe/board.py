"""Report queue from the workers to the driver: an actor that holds the reports of rank 0 until the driver's
sinks take them.

No report is lost when the board's process dies. A poster keeps reports that the driver has not confirmed, and
posts them again to a restarted board; the driver drops duplicates.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_REPORTS = 10_000


@dataclass(frozen=True)
class Report:
    """The start of a phase, a finished step, an evaluation, rollouts to log, or a message."""

    kind: str  # "phase" | "step" | "eval" | "rollouts" | "event" | "note" | "warning" | "failure"
    step: int
    text: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    then: str = ""  # how a failure is handled


class Posted(NamedTuple):
    """A report with its poster and sequence number."""

    poster: str
    number: int  # from 1
    report: Report


class Receipt(NamedTuple):
    board: str  # id of the board's process
    confirmed: int  # reports of this poster up to this number are confirmed


class Board:
    """An async actor, one per run. It holds at most `max_reports`; dropped reports are counted."""

    def __init__(self, max_reports: int = MAX_REPORTS) -> None:
        self.name = uuid.uuid4().hex
        self.max_reports = max_reports
        self.waiting: list[Posted] = []
        self.num_given = 0  # of `waiting`: returned to a driver that has not confirmed them yet
        self.num_dropped = 0
        self.num_warnings = 0  # written by the board itself
        self.confirmed: dict[str, int] = {}
        self.arrived = asyncio.Event()

    async def ping(self) -> bool:
        """Liveness check of the reaper: the board is the run's lease, as it dies with the driver."""
        return True

    async def post(self, posted: Posted) -> Receipt:
        self.waiting.append(posted)
        if len(self.waiting) - self.num_given > self.max_reports:
            self._drop_one()
        self.arrived.set()
        return Receipt(self.name, self.confirmed.get(posted.poster, 0))

    def _drop_one(self) -> None:
        """The driver does not take reports: drop the oldest phase first, which is outdated soonest."""
        kept = range(self.num_given, len(self.waiting))
        phases = (index for index in kept if self.waiting[index].report.kind == "phase")
        del self.waiting[next(phases, self.num_given)]
        self.num_dropped += 1

    async def take(
        self, timeout_seconds: float, confirmed: tuple[str, int] = ("", 0)
    ) -> tuple[str, list[Posted]]:
        """This board's name and all waiting reports; waits up to the timeout for the first one.

        Args:
            confirmed: name of the board that the caller last took a list from, and the length of that
                list; if it is this board, those reports are dropped.
        """
        name, count = confirmed
        if name == self.name:
            for posted in self.waiting[:count]:
                self.confirmed[posted.poster] = max(self.confirmed.get(posted.poster, 0), posted.number)
            del self.waiting[:count]
            self.num_given = 0
            if not self.waiting:
                self.arrived.clear()
        try:
            await asyncio.wait_for(self.arrived.wait(), timeout_seconds)
        except TimeoutError:
            return self.name, []
        if self.num_dropped:
            text = f"{self.num_dropped} reports were dropped: the driver did not take them in time"
            step = self.waiting[-1].report.step  # the newest is never dropped
            self.num_warnings += 1
            self.waiting.append(Posted(self.name, self.num_warnings, Report("warning", step, text)))
        self.num_given, self.num_dropped = len(self.waiting), 0
        return self.name, list(self.waiting)


class Poster:
    """Numbers reports, and keeps each until the driver has confirmed it. The caller makes the Ray calls."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.unconfirmed: dict[int, Posted] = {}
        self.board = ""
        self.num_deaths = 0  # of boards' processes
        self._number = 0
        self._lock = threading.Lock()

    def number(self, report: Report) -> Posted:
        with self._lock:
            self._number += 1
            posted = Posted(self.name, self._number, report)
            self.unconfirmed[self._number] = posted
            if len(self.unconfirmed) > MAX_REPORTS:  # as many as a board holds
                del self.unconfirmed[min(self.unconfirmed)]
            return posted

    def handle_receipts(self, receipts: Iterable[Receipt | None]) -> list[Posted]:
        """The reports to post again: all unconfirmed ones, if a receipt is from another board than before or
        is missing (None).
        """
        with self._lock:
            again = False
            for receipt in receipts:
                if receipt is None:
                    again = True
                    continue
                if self.board and receipt.board != self.board:
                    self.num_deaths += 1
                    again = True
                self.board = receipt.board
                if not again:
                    self._forget(receipt.confirmed)
            return list(self.unconfirmed.values()) if again else []

    def _forget(self, confirmed: int) -> None:
        for number in [number for number in self.unconfirmed if number <= confirmed]:
            del self.unconfirmed[number]


class Taker:
    """Driver side: drops duplicates from a board's reports, and returns those of each poster in order.

    After a board's death a report may arrive before earlier ones that are posted again; it waits for them at
    most `gap_seconds`, since reports that a board has dropped never arrive.
    """

    def __init__(self, gap_seconds: float = 10.0) -> None:
        self.last_taken = ("", 0)  # board, number of reports
        self.gap_seconds = gap_seconds
        self._last: dict[str, int] = {}  # by poster, the number of the newest report that was passed on
        self._held: dict[str, dict[int, Report]] = {}
        self._waits_since: dict[str, float] = {}

    def new(self, board: str, waiting: list[Posted], *, last_call: bool = False) -> list[Report]:
        """With `last_call` nothing is held back."""
        self.last_taken = (board, len(waiting))
        found: list[Report] = []
        for poster, number, report in waiting:
            if number > self._last.get(poster, 0):
                self._held.setdefault(poster, {})[number] = report
                found += self._next(poster, last_call)
        for poster in list(self._held):
            found += self._next(poster, last_call)
        return found

    def _next(self, poster: str, last_call: bool) -> list[Report]:
        held, found = self._held.get(poster, {}), []
        now = time.monotonic()
        while held:
            number = min(held)
            if number > self._last.get(poster, 0) + 1 and not last_call:
                since = self._waits_since.setdefault(poster, now)
                if now - since < self.gap_seconds:
                    return found
            self._waits_since.pop(poster, None)
            self._last[poster] = number
            found.append(held.pop(number))
        self._held.pop(poster, None)
        return found
