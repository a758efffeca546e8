"""Runs one command and makes sure that nothing of it is left afterwards.

Usage: `python supervisor.py <parent's pid> <folder to remove at the end> <command> [argument ...]`

The supervisor ends the command's whole process tree when the command exits, when it is told to (SIGTERM,
SIGINT) and when its parent disappears, even by SIGKILL. Processes whose own parent died before them stay in
the tree, since the supervisor adopts them (`PR_SET_CHILD_SUBREAPER`): what it ends is exactly its
descendants, found by pid, never by name. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

GRACE_SECONDS = 8.0  # from SIGTERM to SIGKILL; longer than Ray's head needs to stop its own processes
KILL_SECONDS = 5.0
POLL_SECONDS = 0.05

PR_SET_PDEATHSIG = 1  # see prctl(2)
PR_SET_CHILD_SUBREAPER = 36


def supervise(parent_pid: int, folder: Path, command: list[str]) -> int:
    """Run `command` to its end or to ours, end its process tree, remove `folder`; its exit code."""
    told_to_stop = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told_to_stop
        told_to_stop = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before PR_SET_PDEATHSIG was in force
        told_to_stop = True

    def obey_parent() -> None:  # the command gets SIGTERM should even the supervisor be killed the hard way
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    code: int | None = None
    try:
        if not told_to_stop:
            child = subprocess.Popen(command, preexec_fn=obey_parent)
            while (code := child.poll()) is None and not told_to_stop:
                time.sleep(POLL_SECONDS)
    finally:
        end_descendants()
        shutil.rmtree(folder, ignore_errors=True)
    return 128 + signal.SIGTERM if code is None else code


def end_descendants() -> None:
    """SIGTERM to the children, which know best how to stop theirs; SIGKILL to all that is left later."""
    for process in psutil.Process().children():
        _signal(process, signal.SIGTERM)
    if _none_left_within(GRACE_SECONDS):
        return
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:  # again and again: a process may just have forked
        for process in psutil.Process().children(recursive=True):
            _signal(process, signal.SIGKILL)
        if _none_left_within(POLL_SECONDS):
            return


def _none_left_within(seconds: float) -> bool:
    """Whether every descendant is gone by then. A subreaper without children has no descendants either."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # reaped one
        except ChildProcessError:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_SECONDS)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # gone by itself meanwhile
        process.send_signal(number)


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
