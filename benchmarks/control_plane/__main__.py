"""Control plane of a run at 8, 64 and 512 GPUs, on paper from unit costs measured on CPUs, and what else a
CPU can measure of how GPUs are used; both before and after.

    .venv/bin/python -m benchmarks.control_plane

Fake replicas and workers, no models: each unit cost is one of the real code (stores, channels, collectives,
balancing, Ray Train's and Ray Serve's controllers), each in processes of its own, three times. Writes
control_plane.json and .md; takes about ten minutes on two cores. With `--units FOLDER` a unit that has been
measured there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.control_plane.model import SIZES, by_process, critical_path, rows
from benchmarks.control_plane.report import page
from benchmarks.estimators import cpu_model
from jobs.demo.model import REPOSITORY

MODULES = ("host_costs", "ray_costs", "serve_costs")
ROUNDS = 3
PACKAGES = ("ray", "torch", "pyzmq")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--units", type=Path, help="folder of unit costs, to go on with")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.units or Path(scratch)
        counts = measured("counts", folder / "counts.json")
        readiness = measured("readiness", folder / "readiness.json")
        runs: dict[str, list[float]] = {}
        for number in range(ROUNDS):
            for module in MODULES:
                for name, seconds in measured(module, folder / f"{module}-{number}.json").items():
                    runs.setdefault(name, []).append(seconds)
    units = {name: statistics.median(values) for name, values in runs.items()} | counts
    tables = {w: rows(w, units) for w in SIZES}
    report: dict[str, Any] = {
        "units": runs,
        "counts": counts,
        "readiness": readiness,
        "rows": {w: [row._asdict() for row in found] for w, found in tables.items()},
        "critical_seconds": {
            w: [critical_path(found, when) for when in (0, 1)] for w, found in tables.items()
        },
        "process_seconds": {w: [by_process(found, when) for when in (0, 1)] for w, found in tables.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {cpu_model()}",
        "versions": {package: version(package) for package in PACKAGES},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "control_plane.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "control_plane.md").write_text(page(report, tables))
    print(page(report, tables))
    return 0


def measured(module: str, path: Path) -> dict[str, Any]:
    """What a module measures in processes of its own: the last line that it prints."""
    if not path.exists():
        print(f"{path.stem} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", f"benchmarks.control_plane.{module}"]
        done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
        path.write_text(done.stdout.strip().splitlines()[-1])
    return json.loads(path.read_text())


if __name__ == "__main__":
    raise SystemExit(main())
