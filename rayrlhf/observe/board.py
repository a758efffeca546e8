"""From the workers to the driver: a small actor that queues what rank 0 reports until the driver's sinks
take it.

No report is lost when the board's process dies. A poster keeps what the driver has not confirmed, and posts
it again to a board that it does not know; the driver leaves out what it has had already.
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
    """One thing worth telling: a phase that began, a finished step, an evaluation, rollouts to keep."""

    kind: str  # "phase" | "step" | "eval" | "rollouts" | "event" | "note" | "warning" | "failure"
    step: int
    text: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    then: str = ""  # what is done about a failure


class Posted(NamedTuple):
    """A report, and which of its poster's it is."""

    poster: str
    number: int  # from 1
    report: Report


class Receipt(NamedTuple):
    board: str  # which process it is from
    confirmed: int  # of this poster's, by the driver: all up to this number


class Board:
    """An async actor, one per run. It holds at most `max_reports`; what it drops is counted."""

    def __init__(self, max_reports: int = MAX_REPORTS) -> None:
        self.name = uuid.uuid4().hex
        self.max_reports = max_reports
        self.waiting: list[Posted] = []
        self.num_given = 0  # of them, to a driver that has not confirmed them yet
        self.num_dropped = 0
        self.num_warnings = 0  # that it wrote itself
        self.confirmed: dict[str, int] = {}
        self.arrived = asyncio.Event()

    async def ping(self) -> bool:
        """The board doubles as the run's lease: it dies with the driver, and the reaper notices."""
        return True

    async def post(self, posted: Posted) -> Receipt:
        self.waiting.append(posted)
        if len(self.waiting) - self.num_given > self.max_reports:
            self._drop_one()
        self.arrived.set()
        return Receipt(self.name, self.confirmed.get(posted.poster, 0))

    def _drop_one(self) -> None:
        """The driver does not take reports: the oldest phase goes first, it is news for a moment only."""
        kept = range(self.num_given, len(self.waiting))
        phases = (index for index in kept if self.waiting[index].report.kind == "phase")
        del self.waiting[next(phases, self.num_given)]
        self.num_dropped += 1

    async def take(self, timeout_seconds: float, had: tuple[str, int] = ("", 0)) -> tuple[str, list[Posted]]:
        """This board's name and everything that waits; waits up to the timeout for the first. `had`: whose
        list the caller has last been given, and how many were in it: they need not be kept any longer.
        """
        name, count = had
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
            text = f"{self.num_dropped} reports were dropped: nothing took them from the board for long"
            step = self.waiting[-1].report.step  # the newest is never dropped
            self.num_warnings += 1
            self.waiting.append(Posted(self.name, self.num_warnings, Report("warning", step, text)))
        self.num_given, self.num_dropped = len(self.waiting), 0
        return self.name, list(self.waiting)


class Poster:
    """Numbers reports, and keeps each until the driver has it. Without Ray: its calls are the caller's."""

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

    def hear(self, receipts: Iterable[Receipt | None]) -> list[Posted]:
        """What is to be posted again: everything unconfirmed, when a receipt (None: there will be none) is
        not of the board before.
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
    """The driver's end: what is new of what a board gives, in the order in which each poster wrote it.

    After a board's death a report may come before those that are posted again; it waits for them, but not
    longer than `gap_seconds`: what a board has dropped never comes.
    """

    def __init__(self, gap_seconds: float = 10.0) -> None:
        self.had = ("", 0)
        self.gap_seconds = gap_seconds
        self._last: dict[str, int] = {}  # by poster, the number of the newest report that was passed on
        self._held: dict[str, dict[int, Report]] = {}
        self._waits_since: dict[str, float] = {}

    def new(self, board: str, waiting: list[Posted], *, last_call: bool = False) -> list[Report]:
        """With `last_call` nothing is held back."""
        self.had = (board, len(waiting))
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
