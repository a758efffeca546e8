"""Two runs of one name never write to one folder."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf.runtime.preflight import InputError
from rayrlhf.runtime.run_lock import run_lock

HOLDER = """
import sys, time
from pathlib import Path
from rayrlhf.runtime.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_of_two_runs_is_refused_with_pid_and_host_until_kill_9(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError) as refused, run_lock(run):
            pass
        expected = f"run.name=demo is in use by process {holder.pid} on {socket.gethostname()}, for 0 min"
        assert str(refused.value).startswith(expected)
        assert "another run.name" in str(refused.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with run_lock(run) as warning:  # at once, with nothing to remove by hand
        assert warning is None
        assert f'"pid": {os.getpid()},' in (run / "run.lock").read_text()
    with run_lock(run):
        pass


def test_runs_of_other_names_do_not_meet(tmp_path: Path) -> None:
    with run_lock(tmp_path / "a"), run_lock(tmp_path / "b"):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run_lock(tmp_path / "a") as warning:
        assert warning is not None and re.search("without locks", warning)
