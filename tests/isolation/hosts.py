"""Hosts for tests: what foreign code may do to its process."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Evaluator:
    """Runs expressions as a plain function of the user's runs: on a thread."""

    def __init__(self, at_start: str = "None", max_calls: int = 8) -> None:
        self.max_calls = max_calls
        eval(at_start, globals())

    async def run(self, expression: str) -> Any:
        result, error = await asyncio.to_thread(_outcome, expression)
        if error is not None:
            raise error
        return result

    async def block(self, seconds: float) -> None:
        """An async function that is none."""
        time.sleep(seconds)


def _outcome(expression: str) -> tuple[Any, BaseException | None]:
    try:
        return eval(expression, globals()), None
    except BaseException as error:
        return None, error


def interrupt() -> None:
    raise KeyboardInterrupt("as by Ctrl-C")


def crash() -> None:
    ctypes.string_at(0)


def hold_the_lock() -> None:
    """C code that does not give up the interpreter's lock."""
    ctypes.PyDLL(None).sleep(1000)


def leave_daemons(file: str) -> int:
    """One in the process group, one in a session of its own; their numbers go into `file`."""
    here = subprocess.Popen(["sleep", "1000"])
    elsewhere = subprocess.Popen(["setsid", "sleep", "1000"])
    Path(file).write_text(f"{here.pid} {elsewhere.pid}")
    return here.pid


def fork_for_ever() -> None:
    """A bomb, though one that a machine bears."""
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(1000)
    time.sleep(1000)


def grow(gib: float) -> None:
    held = bytearray(int(gib * 2**30))
    for i in range(0, len(held), 4096):
        held[i] = 1
    time.sleep(1000)


def ruin_the_surroundings() -> None:
    os.chdir("/")
    os.environ["RUINED"] = "1"
    os.umask(0o777)
    sys.path.clear()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
