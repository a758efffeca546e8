"""Results of steps: one JSON line each in a file that is only ever appended to, and a table of them.

    {"name": "ipc_handles", "ok": true, "reason": "", "seconds": 21.4,
     "measured": {"read": {"value": 1830.0, "unit": "GB/s"}},
     "error": [], "device": "NVIDIA H200", "commit": "e9d7d1041b61", "source": "5f0c9a31d2b84e77",
     "versions": {"torch": "2.13.0"}, "time": "2026-12-01T15:42:28+00:00"}

`ok` is null for a step that was skipped; `reason` says why, also for a failure. `error` has the last lines
that a failed step printed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.host import Host

Measured = dict[str, dict[str, Any]]  # name -> {"value": 3.2, "unit": "GB/s"}


@dataclass(frozen=True)
class Result:
    name: str
    ok: bool | None
    reason: str
    seconds: float
    measured: Measured
    error: list[str]
    device: str
    commit: str
    source: str
    versions: dict[str, str]
    time: str

    @property
    def outcome(self) -> str:
        return {True: "ok", False: "FAILED", None: "skipped"}[self.ok]


def result_of(
    host: Host,
    name: str,
    ok: bool | None,
    reason: str = "",
    *,
    seconds: float = 0.0,
    measured: Measured | None = None,
    error: Sequence[str] = (),
) -> Result:
    return Result(
        name,
        ok,
        reason,
        round(seconds, 1),
        measured or {},
        list(error),
        host.device,
        host.commit,
        host.source,
        host.versions,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def append(path: Path, result: Result) -> str:
    """Returns the line."""
    line = json.dumps(asdict(result))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")
    return line


def read(path: Path) -> list[Result]:
    """All complete lines: one that an interrupted run has cut off is left out."""
    if not path.is_file():
        return []
    names = {field.name for field in fields(Result)}
    results: list[Result] = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        found = json.loads(line)
        if not isinstance(found, dict) or found.keys() != names:
            raise ValueError(f"{path}:{number} is not a result of gpu-check; give another file by --out")
        results.append(Result(**found))
    return results


def succeeded(path: Path, host: Host) -> dict[str, Result]:
    """Steps that need not run again: done with this source, on this device, with these versions."""
    return {
        result.name: result
        for result in read(path)
        if result.ok
        and (result.device, result.source, result.versions) == (host.device, host.source, host.versions)
    }


def table(results: Sequence[Result]) -> str:
    """Markdown: how each step ended, and why."""
    lines = ["| step | | seconds | why |", "|---|---|---:|---|"]
    lines += [
        f"| {result.name} | {result.outcome} | {result.seconds:.1f} | {_in_a_cell(result.reason)} |"
        for result in results
    ]
    return "\n".join(lines)


def page(host: Host, results: Sequence[Result]) -> str:
    """Markdown: how the steps ended, and all that they measured."""
    versions = ", ".join(f"{name} {number}" for name, number in host.versions.items())
    parts = [
        f"# GPU check on {host.device}",
        f"{versions}; commit {host.commit or 'unknown'}, source {host.source}. By `make gpu-check`; what a "
        "step does stands in `benchmarks/gpu_check/steps/`.",
        table(results),
    ]
    for result in results:
        if result.measured:
            rows = [
                f"| {_in_a_cell(name)} | {_in_a_cell(str(each['value']))} | {each['unit']} |"
                for name, each in result.measured.items()
            ]
            parts += [f"## {result.name}", "\n".join(["| | | |", "|---|---:|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
