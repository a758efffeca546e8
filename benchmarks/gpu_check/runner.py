"""Runs a step in a process of its own, until its end or its deadline."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.host import ROOT, Host
from benchmarks.gpu_check.results import Measured, Result, result_of

ERROR_LINES = 25
GRACE_SECONDS = 10.0  # between SIGTERM, at the deadline, and SIGKILL
INSTALLED_AS = {"zmq": "pyzmq"}


@dataclass(frozen=True)
class Step:
    name: str
    function: str  # module:function
    seconds: float  # deadline
    needs: tuple[str, ...] = ()  # packages other than torch and transformers
    what: str = ""


@dataclass(frozen=True)
class Options:
    device: str
    traces: Path
    cumem: Path | None = None


def run_step(step: Step, host: Host, options: Options, *, seconds_left: float = float("inf")) -> Result:
    """What the step measured, or why it failed or was skipped. Leaves no process behind."""
    missing = [package for package in step.needs if not is_installed(package)]
    if missing:
        names = " and ".join(INSTALLED_AS.get(package, package) for package in missing)
        verb = "is" if len(missing) == 1 else "are"
        return result_of(host, step.name, None, f"{names} {verb} not installed")
    deadline = min(step.seconds, seconds_left)
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.jsonl", Path(folder) / "log"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu_check.child",
            step.function,
            "--device",
            options.device,
        ]
        command += ["--answer", str(answer), "--traces", str(options.traces)]
        if options.cumem is not None:
            command += ["--cumem", str(options.cumem)]
        started = time.monotonic()
        status = _run(command, log, deadline, on_gpu=options.device == "cuda")
        seconds = time.monotonic() - started
        measured, end = _read(answer)
        lines = log.read_text(errors="replace").splitlines()[-ERROR_LINES:]

    def result(ok: bool | None, reason: str = "", error: list[str] | None = None) -> Result:
        return result_of(host, step.name, ok, reason, seconds=seconds, measured=measured, error=error or [])

    if status is None:
        return result(False, f"not done within {deadline:.0f} s", lines)
    if status < 0:
        return result(False, f"died by {signal.Signals(-status).name}", lines)
    if status > 0 or "end" not in end:
        last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
        return result(False, last.strip() if status else "it ended before its end", lines)
    if end["end"] == "skipped":
        return result(None, end["reason"])
    return result(True)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _run(command: list[str], log: Path, seconds: float, *, on_gpu: bool) -> int | None:
    """The exit status, negative for a signal; None at the deadline."""
    # Two processes that share the cores of a CPU are many times slower with several threads each.
    environment = os.environ | ({} if on_gpu else {"OMP_NUM_THREADS": "1"})
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # it prints where it is
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return None
    finally:
        # Also what it started: those processes would keep memory of the GPU from the next step.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(answer: Path) -> tuple[Measured, dict[str, str]]:
    """Measurements, and the last line if the step wrote one."""
    measured: Measured = {}
    for line in answer.read_text().splitlines() if answer.is_file() else []:
        found = json.loads(line)
        if "end" in found:
            return measured, found
        measured[found["name"]] = {"value": found["value"], "unit": found["unit"]}
    return measured, {}
