"""From the workers to the driver: a small actor that queues what rank 0 reports until the driver's sinks
take it.

No report is lost when the board's process dies. A poster keeps what the driver has not confirmed, and posts
it again to a board that it does not know; the driver leaves out what it has had already.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Report:
    """One thing worth telling: a phase that began, a finished step, an evaluation, rollouts to keep."""

    kind: str  # "phase" | "step" | "eval" | "rollouts" | "warning"
    step: int
    text: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


class Posted(NamedTuple):
    """A report, and which of its poster's it is."""

    poster: str
    number: int  # from 1
    report: Report


class Receipt(NamedTuple):
    board: str  # which process it is from
    confirmed: int  # of this poster's, by the driver: all up to this number


class Board:
    """An async actor, one per run."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.waiting: list[Posted] = []
        self.confirmed: dict[str, int] = {}
        self.arrived = asyncio.Event()

    async def ping(self) -> bool:
        """The board doubles as the run's lease: it dies with the driver, and the reaper notices."""
        return True

    async def post(self, posted: Posted) -> Receipt:
        self.waiting.append(posted)
        self.arrived.set()
        return Receipt(self.name, self.confirmed.get(posted.poster, 0))

    async def take(self, timeout_seconds: float, had: tuple[str, int] = ("", 0)) -> tuple[str, list[Posted]]:
        """This board's name and everything that waits; waits up to the timeout for the first. `had`: whose
        list the caller has last been given, and how many were in it: they need not be kept any longer.
        """
        name, count = had
        if name == self.name:
            for posted in self.waiting[:count]:
                self.confirmed[posted.poster] = max(self.confirmed.get(posted.poster, 0), posted.number)
            del self.waiting[:count]
            if not self.waiting:
                self.arrived.clear()
        try:
            await asyncio.wait_for(self.arrived.wait(), timeout_seconds)
        except TimeoutError:
            return self.name, []
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
    """The driver's end: what is new of what a board gives."""

    def __init__(self) -> None:
        self.had = ("", 0)
        self._seen: dict[str, set[int]] = {}

    def new(self, board: str, waiting: list[Posted]) -> list[Report]:
        self.had = (board, len(waiting))
        found: list[Report] = []
        for poster, number, report in waiting:
            seen = self._seen.setdefault(poster, set())
            if number not in seen:
                seen.add(number)
                found.append(report)
        return found
