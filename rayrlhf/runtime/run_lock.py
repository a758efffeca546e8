"""Lock on a run's folder, so that only one process at a time runs under a run name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayrlhf.runtime.preflight import InputError

LOCK_FILE = "run.lock"
BUSY = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network file systems have none


@contextmanager
def run_lock(run_path: Path) -> Iterator[str | None]:
    """Hold the folder's lock while the body runs. Yields a warning if the file system has no locks.

    The kernel releases the lock when the process ends, also by kill -9, so no stale lock has to be removed.
    The file names the holder.

    Raises:
        InputError: with pid and host, while another process holds the lock.
    """
    run_path.mkdir(parents=True, exist_ok=True)
    with (run_path / LOCK_FILE).open("a+") as file:
        warning = None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in BUSY:
                raise InputError(_refusal(run_path, file.name)) from None
            if error.errno not in NO_LOCKS:
                raise
            warning = f"{run_path} is on a file system without locks: two runs of one name are not noticed"
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        file.flush()
        try:
            yield warning
        finally:
            file.truncate(0)  # kept: the locks of a removed file and of a new one would both be granted


def _refusal(run_path: Path, path: str) -> str:
    try:
        holder = json.loads(Path(path).read_text())
        minutes = (time.time() - holder["since"]) / 60
        who = f"process {holder['pid']} on {holder['host']}, for {minutes:.0f} min"
    except (ValueError, KeyError, TypeError):
        who = "a process that is just starting or ending"
    return (
        f"run.name={run_path.name} is in use by {who}: two runs would write to {run_path}. "
        "Wait for it, end that process, or give this run another run.name"
    )
