"""Ends what a killed driver leaves of the local Ray that it had started.

Ray's own processes notice the death of their driver, but some of them only after minutes. The watchdog is a
child of the driver with a pipe to it; while the driver lives it remembers the driver's descendants, and when
the pipe closes it ends those that are still there. It never touches a process that the driver has not
started.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

import psutil

LOOK_SECONDS = 2.0
GRACE_SECONDS = 5.0  # for processes to leave by themselves


def start_watchdog() -> subprocess.Popen[bytes]:
    """Watch this process; `terminate()` the returned one after an orderly end."""
    command = [sys.executable, "-m", "rayrlhf.loops.watchdog", str(os.getpid())]
    # A session of its own: Ctrl-C in the terminal must not end the watchdog before its driver.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def watch(driver_pid: int) -> None:
    """Return when the driver is gone and so is everything it had started."""
    seen: set[psutil.Process] = set()  # compares pid and start time: a reused pid is another process
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        try:
            seen |= set(psutil.Process(driver_pid).children(recursive=True))
        except psutil.NoSuchProcess:
            break
    deadline = time.monotonic() + GRACE_SECONDS
    left = {process for process in seen if process.pid != os.getpid()}
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left = {process for process in left if process.is_running()}
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    watch(int(sys.argv[1]))
