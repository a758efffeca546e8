"""A thread and a bounded queue per sink: a sink that fails or hangs does not affect the others."""

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
    """Writes reports, in order, to the sink that `make` returns.

    If the sink cannot be created or written, `warn` is called once, its reports are dropped and counted, and
    it is retried after `retry_seconds`: a full disk may have room again, a server may be back.
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
        """Never blocks. A report is lost and counted if the queue is full."""
        try:
            self._queue.put_nowait(report)
        except queue.Full:
            self.num_lost += 1

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Write queued reports and close the sink; warn about lost reports and about a missed deadline."""
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
        self._attempt(self._open)  # at once, so that a failure is known before the first report
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
        except Exception as error:  # whatever a disk, a library or a server raises: the run continues
            self._retry_at = time.monotonic() + self._retry_seconds
            if not self._failing:
                self._failing = True
                self._warn(
                    f"{self.name} cannot be written ({type(error).__name__}: {error}); the run "
                    f"continues without it, with a retry every {self._retry_seconds:g} s"
                )
            return False
        if self._failing and is_write:
            self._failing = False
            self._warn(f"{self.name} is written again; {self.num_lost} reports are missing from it")
        return True
