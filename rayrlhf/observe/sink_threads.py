"""A thread and a bounded queue for each sink: one that fails or hangs takes nothing from the others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from rayrlhf.observe.board import Report

QUEUE_REPORTS = 1_000
RETRY_SECONDS = 60.0
CLOSE_SECONDS = 30.0


class Sink(Protocol):
    def write(self, report: Report) -> None: ...

    def close(self) -> None: ...


class SinkThread:
    """Writes reports to the sink that `make` returns, in the order in which they come.

    Where the sink cannot be made or written, `warn` says so once, its reports are dropped and counted, and
    after `retry_seconds` it is tried again: a disk that was full may have room, a server may be back.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Sink],
        warn: Callable[[str], None],
        *,
        max_reports: int = QUEUE_REPORTS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.name = name
        self.num_lost = 0
        self._make = make
        self._warn = warn
        self._retry_seconds = retry_seconds
        self._queue: queue.Queue[Report | None] = queue.Queue(max_reports)
        self._sink: Sink | None = None
        self._failing = False
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"sink-{name}")
        self._thread.start()

    def write(self, report: Report) -> None:
        """Does not wait. A report that the queue has no room for is lost and counted."""
        try:
            self._queue.put_nowait(report)
        except queue.Full:
            self.num_lost += 1

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Write what is queued and close the sink; says what was lost, and what did not end in time."""
        deadline = time.monotonic() + timeout_seconds
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                if time.monotonic() > deadline:
                    break
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(
                f"{self.name} did not finish within {timeout_seconds:g} s: its last reports are missing"
            )
        elif self.num_lost:
            self._warn(f"{self.name} lacks {self.num_lost} reports of this run")

    def _run(self) -> None:
        self._attempt(self._open)  # at once: better known before the first report
        while (report := self._queue.get()) is not None:
            if time.monotonic() < self._retry_at or not self._attempt(lambda r=report: self._open().write(r)):
                self.num_lost += 1
        if self._sink is not None:
            self._attempt(self._sink.close, is_write=False)

    def _open(self) -> Sink:
        if self._sink is None:
            self._sink = self._make()
        return self._sink

    def _attempt(self, action: Callable[[], object], *, is_write: bool = True) -> bool:
        try:
            action()
        except Exception as error:  # whatever a disk, a library or a server does: the run goes on
            self._retry_at = time.monotonic() + self._retry_seconds
            if not self._failing:
                self._failing = True
                self._warn(
                    f"{self.name} cannot be written ({type(error).__name__}: {error}); the run goes on "
                    f"without it, and tries again every {self._retry_seconds:g} s"
                )
            return False
        if self._failing and is_write:
            self._failing = False
            self._warn(f"{self.name} is written again; {self.num_lost} reports are missing from it")
        return True
