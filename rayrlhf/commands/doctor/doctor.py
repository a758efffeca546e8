"""`rayrlhf doctor`: checks whether this machine, or a cluster, can run jobs, with a fix for what fails."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.text import Text

from rayrlhf.commands.doctor import environment, gpus, machine, probes, versions
from rayrlhf.commands.doctor.finding import Finding
from rayrlhf.terminal import SafeConsole, make_console
from rayrlhf.untrusted_text import visible

COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
NAME_WIDTH = 18

Check = Callable[[], Iterator[Finding]]


def main(words: Sequence[str]) -> int:
    """Returns 0 when nothing failed, else 1."""
    options = _parser().parse_args(list(words))
    findings: list[Finding] = []
    console = make_console(log_width=120)
    for check in _checks(options):
        for finding in check():
            findings.append(finding)
            if not options.json:
                _print(console, finding)
    failed = sum(finding.status == "fail" for finding in findings)
    warned = sum(finding.status == "warn" for finding in findings)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(f"\n{failed} failed, {warned} warnings, {len(findings) - failed - warned} ok.")
    return 1 if failed else 0


def _checks(options: argparse.Namespace) -> list[Check]:
    checks: list[Check] = [
        versions.check_versions,
        gpus.check_gpus,
        gpus.check_nccl,
        machine.check_memory,
        machine.check_shared_memory,
        machine.check_limits,
        machine.check_ports,
        partial(machine.check_disks, options.path),
        environment.check_environment,
        probes.check_collective,
    ]
    if not options.no_ray:
        checks.append(partial(probes.check_ray, options.address))
    return checks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayrlhf doctor",
        description="Check whether this machine, or a cluster, can run jobs, with a fix for what fails.",
    )
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="a Ray cluster to check (default RAY_ADDRESS); without one a local Ray is started and stopped",
    )
    parser.add_argument("--path", type=Path, default=Path("runs"), help="where runs will be written")
    parser.add_argument("--no-ray", action="store_true", help="do not check Ray")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _print(console: SafeConsole, finding: Finding) -> None:
    status = f"{finding.status:<5}", COLORS[finding.status]
    line = Text.assemble(status, f"{finding.name:<{NAME_WIDTH}}", visible(finding.found))
    console.print(line, soft_wrap=True)
    if finding.fix:
        console.print(Text(f"{'':<5}{'':<{NAME_WIDTH}}fix: {visible(finding.fix)}"), soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
