"""Runs one command: when it printed which line, how long it took, and the most memory that its processes
held."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

SAMPLE_SECONDS = 1.5
TAIL_LINES = 12
GRACE_SECONDS = 1.0  # for what the command still writes about its last step


class Line(NamedTuple):
    seconds: float  # since the command's start
    text: str


class Ran(NamedTuple):
    lines: list[Line]
    seconds: float
    started_at: float  # time.time() of the start
    peak_bytes: int  # anonymous memory of all processes, and shared memory once


class CommandFailed(Exception):
    """A measured command failed; the end of what it printed."""


def run_command(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    log: Path,
    cores: Sequence[int],
    deadline_seconds: float,
    ends_at: Callable[[str], bool] = lambda _: False,
) -> Ran:
    """Run on `cores`; where a line `ends_at`, stop it shortly after: all that is wanted has been measured.

    Raises `CommandFailed` for a non-zero exit status before that, and where the deadline passes.
    """
    started, started_at = time.perf_counter(), time.time()
    process = subprocess.Popen(
        command,
        env=dict(env),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    memory = _Memory(process.pid)
    alarm = threading.Timer(deadline_seconds, lambda: _end(process))
    alarm.start()
    lines: list[Line] = []
    status: int | None = None
    try:
        assert process.stdout is not None
        with log.open("w", buffering=1) as file:
            for text in process.stdout:
                lines.append(Line(time.perf_counter() - started, text.rstrip("\n")))
                file.write(f"{lines[-1].seconds:8.2f} {text}")
                if ends_at(text):
                    time.sleep(GRACE_SECONDS)
                    status = 0
                    break
            else:
                status = process.wait()
    finally:
        alarm.cancel()
        _end(process)
        peak_bytes = memory.stop()
    seconds = time.perf_counter() - started
    if status != 0:
        why = f"no end within {deadline_seconds:.0f} s" if seconds >= deadline_seconds else f"status {status}"
        tail = "\n".join(line.text for line in lines[-TAIL_LINES:])
        raise CommandFailed(f"{why}: {' '.join(command[:4])} …\n{tail}")
    return Ran(lines, seconds, started_at, peak_bytes)


class _Memory:
    """The most memory that a process and all below it held, sampled in a thread: anonymous pages, and shared
    ones of the process that maps most of them. Both are counters of the kernel; proportional set sizes, which
    walk through all pages of all processes, took up to a quarter of a core from what was measured.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="memory")
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            held = [_held_bytes(each.pid) for each in processes]
            private, shared = zip(*held, strict=True)
            self._peak = max(self._peak, sum(private) + max(shared))


def _held_bytes(pid: int) -> tuple[int, int]:
    """Anonymous and shared."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0, 0
    kibibytes = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if name in ("RssAnon", "RssShmem")
    }
    return 1024 * kibibytes.get("RssAnon", 0), 1024 * kibibytes.get("RssShmem", 0)


def _end(process: subprocess.Popen[str]) -> None:
    """End it and its children; SIGTERM first, so that a job takes down the Ray that it started."""
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(below, timeout=5)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
