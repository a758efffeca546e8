"""With a URL as `run.dir`: the driver's copy of the run's folder, and its way to the bucket and back.

The driver writes metrics, logs and its config into a local folder, as with any run. What has changed there is
copied to the bucket in the background. What workers write (checkpoints, exports, shards) they upload
themselves. A start on another machine first fetches what the last one has copied.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from rayrlhf.config.common import RunSection
from rayrlhf.runtime.preflight import InputError
from rayrlhf.runtime.run_lock import LOCK_FILE
from rayrlhf.runtime.scratch import FOLDER as SCRATCH
from rayrlhf.storage.folder import DATA_FOLDER, LocalFolder, RemoteFolder
from rayrlhf.train.checkpoint import TRAIN_FOLDER

OWNER = "owner.json"  # the last start: which one, where, until when
# Uploaded by those who write them, or of no use elsewhere.
NOT_MIRRORED = {
    *(TRAIN_FOLDER, "critic", "critic_trainer", DATA_FOLDER, "shards", "export", "best"),
    *(SCRATCH, LOCK_FILE, OWNER),
}
COPY_SECONDS = 15.0
RENEW_SECONDS = 60.0
LEASE_SECONDS = 180.0  # after the last sign of life, another machine may start the run
SETTLE_SECONDS = 1.0  # after which two starts at the same time see which of them is the owner
Say = Callable[[str], None]


class Mirror:
    """Keeps `url` like the folder `path`, for one start of a run."""

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self.remote = RemoteFolder(url)
        self.copied: dict[str, tuple[int, int]] = {}  # size and time of change of what is in the bucket
        self.owner = {
            "start": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
        }

    def fetch(self, say: Say) -> None:
        """Before anything is read: bring the files of the last start, if it ran on another machine. Raises
        `InputError`.
        """
        try:
            found = self._owner()
            here = self.path / OWNER
            if found is None or (here.is_file() and json.loads(here.read_text())["start"] == found["start"]):
                return
            self._check_owner(found)
            names = [name for name in self.remote.sizes() if _is_mirrored(name)]
            shutil.rmtree(self.path, ignore_errors=True)  # of an earlier start than the last one
            self.remote.download([*names, OWNER], self.path)
        except OSError as error:
            raise InputError(f"{self.remote} cannot be read: {error}") from error
        if names:
            say(f"{len(names)} files of this run fetched from {self.remote} to {self.path}")

    @contextmanager
    def running(self, say: Say) -> Iterator[None]:
        """Own the run and copy what changes, until the end of the context, and all that is left at its end.

        Raises:
            InputError: if another machine owns the run.
        """
        self._claim()
        ended = threading.Event()
        thread = threading.Thread(target=self._copy_until, args=(ended, say), name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.close(say)

    def close(self, say: Say) -> None:
        """Copy what is left, and end the ownership."""
        try:
            self.copy_changes()
            self._write_owner(ended=True)
        except OSError as error:
            say(
                f"warning: {self.remote} cannot be written to, so the last files of the run are only in "
                f"{self.path}: {error}"
            )

    def copy_changes(self) -> list[str]:
        """Upload what has changed since the last call, and remove what is gone; returns their names."""
        now = {
            name: (file.stat().st_size, file.stat().st_mtime_ns)
            for name, file in ((each.relative_to(self.path).as_posix(), each) for each in self._files())
        }
        changed = [name for name, state in now.items() if self.copied.get(name) != state]
        gone = [name for name in self.copied if name not in now]
        self.remote.upload(self.path, changed)
        for name in gone:
            self.remote.remove(name)
        self.copied = now
        return changed + gone

    def _files(self) -> Iterator[Path]:
        for name in sorted(os.listdir(self.path)):
            if not _is_mirrored(name):
                continue
            entry = self.path / name
            files = [entry] if entry.is_file() else sorted(entry.rglob("*"))
            yield from (file for file in files if file.is_file() and not file.name.endswith(".partial"))

    def _copy_until(self, ended: threading.Event, say: Say) -> None:
        failed, renewed, wait = False, time.monotonic(), COPY_SECONDS
        while not ended.wait(wait):
            started = time.monotonic()
            try:
                self.copy_changes()
                if started - renewed >= RENEW_SECONDS:
                    self._write_owner(ended=False)
                    renewed = started
                failed = False
            except OSError as error:
                if not failed:
                    say(f"warning: {self.remote} cannot be written to, which is tried again: {error}")
                failed = True
            wait = max(COPY_SECONDS, 10 * (time.monotonic() - started))  # at most a tenth of the time

    def _claim(self) -> None:
        try:
            self._check_owner(self._owner())
            self._write_owner(ended=False)
            time.sleep(SETTLE_SECONDS)
            self._check_owner(self._owner())
        except OSError as error:
            raise InputError(f"{self.remote} cannot be written to: {error}") from error

    def _owner(self) -> dict[str, Any] | None:
        text = self.remote.read(OWNER)
        return None if text is None else json.loads(text)

    def _check_owner(self, found: dict[str, Any] | None) -> None:
        if found is None or found["start"] == self.owner["start"] or found["ended"]:
            return
        silent = time.time() - found["seen"]
        is_here = found["host"] == self.owner["host"]
        if silent > LEASE_SECONDS or (is_here and not _is_running(found)):
            return
        raise InputError(
            f"run.name={self.path.name} is in use by process {found['pid']} on {found['host']}, last seen "
            f"{silent:.0f} s ago: two runs would write to {self.remote}. Wait for it, end that process (its "
            f"claim ends {LEASE_SECONDS:.0f} s after its last sign), or give this run another run.name"
        )

    def _write_owner(self, *, ended: bool) -> None:
        text = json.dumps({**self.owner, "seen": time.time(), "ended": ended})
        self.remote.write(OWNER, text)
        LocalFolder(self.path).write(OWNER, text)


def mirror_of(run: RunSection) -> Mirror | None:
    """None for a run whose folder all nodes share."""
    return None if run.url is None else Mirror(Path(run.path), run.url)


def _is_mirrored(name: str) -> bool:
    first = name.partition("/")[0]
    return first not in NOT_MIRRORED and not first.startswith(".")


def _is_running(owner: dict[str, Any]) -> bool:
    try:
        return psutil.Process(owner["pid"]).create_time() == owner["process_started"]
    except psutil.NoSuchProcess:
        return False
