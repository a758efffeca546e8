"""Watchdog that ends the processes of a local Ray when the driver that started it is killed.

Ray's processes notice the death of their driver, but some of them only after minutes. The watchdog is a child
process of the driver with a pipe to it. While the driver runs it records the driver's descendants, and when
the pipe closes it ends those that still run. It never ends a process that the driver has not started.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import psutil

LOOK_SECONDS = 2.0
GRACE_SECONDS = 5.0  # for processes to exit by themselves


def start_watchdog() -> subprocess.Popen[bytes]:
    """Start a watchdog of this process. Pass it Ray's session with `name_session`, and `terminate()` it after
    an orderly end.
    """
    command = [sys.executable, "-m", "rayrlhf.runtime.cleanup", str(os.getpid())]
    # In a separate session: Ctrl-C in the terminal must not end the watchdog before its driver.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def name_session(watchdog: subprocess.Popen[bytes], session_name: str) -> None:
    """Pass Ray's session name, which identifies starting processes by their command line."""
    assert watchdog.stdin is not None  # started with a pipe
    watchdog.stdin.write(f"{session_name}\n".encode())
    watchdog.stdin.flush()


def watch(driver_pid: int) -> None:
    """Return when the driver and everything that it started have ended."""
    seen: set[psutil.Process] = set()  # compares pid and start time: a reused pid is another process
    session_name = ""
    while True:
        if select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
            line = sys.stdin.readline()
            if not line:
                break
            session_name = line.strip()
        try:
            seen |= set(psutil.Process(driver_pid).children(recursive=True))
        except psutil.NoSuchProcess:
            break
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := _left(seen, session_name)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _left(seen: set[psutil.Process], session_name: str) -> set[psutil.Process]:
    """Processes of `seen` that still run, and those of the session that started after the last poll."""
    late = {
        process
        for process in psutil.process_iter(["cmdline"])
        if session_name and session_name in " ".join(process.info["cmdline"] or [])
    }
    return {process for process in seen | late if process.is_running() and process.pid != os.getpid()}


if __name__ == "__main__":
    watch(int(sys.argv[1]))
