"""The supervisor ends a whole process tree, whatever became of the processes in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster.local.head import SUPERVISOR

# Starts a process in a session of its own, says its pid, and leaves it behind as an orphan.
LEAVE_AN_ORPHAN = 'setsid sleep 300 & echo $! > "$0"; exit 3'


def supervise(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(SUPERVISOR), str(os.getpid()), str(folder), *command])


def wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)
    return int(path.read_text())


def assert_gone(pid: int, within_seconds: float = 5.0) -> None:
    deadline = time.monotonic() + within_seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def test_exit_code_is_the_commands_and_its_orphans_end_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    pid_file = tmp_path / "pid"
    supervisor = supervise(folder, "bash", "-c", LEAVE_AN_ORPHAN, str(pid_file))
    assert supervisor.wait(20) == 3
    assert_gone(wait_for_pid(pid_file), within_seconds=0.5)
    assert not folder.exists()


def test_sigterm_ends_the_command(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    supervisor = supervise(tmp_path / "none", "bash", "-c", 'echo $$ > "$0"; sleep 300', str(pid_file))
    pid = wait_for_pid(pid_file)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(20) == 128 + signal.SIGTERM
    assert_gone(pid, within_seconds=0.5)


def test_a_command_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    stubborn = f"trap '' TERM; echo $$ > {pid_file}; while true; do sleep 0.1; done"
    short_grace = (
        "import sys; from pathlib import Path; from cluster.local import supervisor;"
        "supervisor.GRACE_SECONDS = 0.3;"
        "sys.exit(supervisor.supervise(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", short_grace, str(os.getpid()), str(tmp_path / "none"), "bash", "-c", stubborn],
        cwd=SUPERVISOR.parents[2],
    )
    pid = wait_for_pid(pid_file)
    process.terminate()
    process.wait(20)
    assert_gone(pid, within_seconds=0.5)


def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    pid_file = tmp_path / "pid"
    parent_code = (
        "import os, subprocess, sys, time;"
        "command = [sys.executable, sys.argv[1], str(os.getpid()), *sys.argv[2:]];"
        "subprocess.Popen(command, start_new_session=True);"
        "time.sleep(300)"
    )
    sleeper = ["bash", "-c", 'echo $$ > "$0"; sleep 300', str(pid_file)]
    parent = subprocess.Popen([sys.executable, "-c", parent_code, str(SUPERVISOR), str(folder), *sleeper])
    pid = wait_for_pid(pid_file)
    parent.kill()
    parent.wait(10)
    assert_gone(pid)
    deadline = time.monotonic() + 5
    while folder.exists():
        assert time.monotonic() < deadline, "the session folder is still there"
        time.sleep(0.02)


def test_without_its_parent_it_does_not_even_start(tmp_path: Path) -> None:
    marker = tmp_path / "started"
    not_its_parent = "1"
    command = [sys.executable, str(SUPERVISOR), not_its_parent, str(tmp_path / "none"), "touch", str(marker)]
    assert subprocess.run(command, timeout=20).returncode == 128 + signal.SIGTERM
    assert not marker.exists()
