"""Subprocess that runs user code: `python -m rayrlhf.isolation.child REQUESTS ANSWERS OUTPUT MEMORY`, three
file descriptors and a number of bytes.

It consists of two processes. The guard, which never runs user code, forks the host and watches it: when the
host exits, uses more than MEMORY, or the owner closes the guard's stdin (on purpose or because the owner
died), the guard kills the host and all of its descendants, writes to stdout how the host ended, and exits.
Neither an interpreter lock that is held forever nor a signal handler of the user's code can prevent that.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any

LOOK_SECONDS = 0.5
KILL_ROUNDS = 500
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(request_fd: int, answer_fd: int, output_fd: int, max_memory_bytes: int) -> None:
    libc = ctypes.CDLL(None)
    # Orphans of the host's children become children of the guard, whatever session they are in.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    host = os.fork()
    if host == 0:
        _become_host(libc, output_fd)
        from rayrlhf.isolation.host import run

        run(request_fd, answer_fd)
    for fd in (request_fd, answer_fd, output_fd):
        os.close(fd)
    ended = _guard(host, max_memory_bytes)
    _kill_everything(host)
    # The owner may be gone.
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(ended).encode())
    os._exit(0)


def _become_host(libc: Any, output_fd: int) -> None:
    """New session, no stdin, output to the owner; the process is killed when the guard dies."""
    os.setsid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for fd in (1, 2):
        os.dup2(output_fd, fd)
    for fd in (nothing, output_fd):
        os.close(fd)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = open(  # noqa: SIM115 - stays open
            fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    # When memory runs out, the OOM killer picks this process before the owner. Not every container allows it.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _guard(host: int, max_memory_bytes: int) -> dict[str, Any]:
    """Wait for the host to end; returns how: `exit` code, `signal`, or `memory` over the limit."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    peak = 0
    while True:
        status = _reap(host)
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            how = {"signal": -code} if code < 0 else {"exit": code}
            return {**how, "peak_bytes": peak}
        readable, _, _ = select.select([0, woken], [], [], LOOK_SECONDS)
        if 0 in readable and not os.read(0, 1):
            return {"closed": True}
        if woken in readable:
            os.read(woken, 4096)
        peak = max(peak, resident := _resident_bytes(host))
        if resident > max_memory_bytes:
            return {"memory": resident}


def _reap(host: int) -> int | None:
    """The host's wait status once it has ended; also reaps orphans that have ended."""
    found = None
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == host:
                found = ended[1]
    return found


def _kill_everything(host: int) -> None:
    """Kill the host's process group at once, which stops a fork bomb, then processes that left the group."""
    for _ in range(KILL_ROUNDS):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(host, signal.SIGKILL)
        left = _descendants()
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        _reap(host)
        if not left:
            return
        time.sleep(0.01)


def _descendants() -> set[int]:
    """Pids of all descendants of this process."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # pid (name, which may contain any character) state parent …
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    remaining = [os.getpid()]
    while remaining:
        below = [pid for pid in children.get(remaining.pop(), []) if pid not in found]
        found.update(below)
        remaining += below
    return found


def _resident_bytes(pid: int) -> int:
    with suppress(OSError, IndexError), open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
