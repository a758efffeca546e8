"""A finding of `rayrlhf doctor`: one line of its report."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    found: str
    fix: str = ""  # what to do, if the status is not ok


def ok(name: str, found: str) -> Finding:
    return Finding(name, "ok", found)


def warn(name: str, found: str, fix: str) -> Finding:
    return Finding(name, "warn", found, fix)


def fail(name: str, found: str, fix: str) -> Finding:
    return Finding(name, "fail", found, fix)


def output_of(command: list[str], *, timeout_seconds: float, env: dict[str, str] | None = None) -> str | None:
    """The output of a command; None if there is no such command.

    Raises `TimeoutExpired`, and `CalledProcessError` with what it printed.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_seconds, check=True, env=env
        )
    except FileNotFoundError:
        return None
    return done.stdout
