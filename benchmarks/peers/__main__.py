"""rayrlhf measured next to its peers, on the CPUs of one machine: `make bench`, or one case of it.

    make bench                                           every case, about 150 minutes on two idle cores
    make bench BENCH_ARGS="--quick"                      one short pair each
    make bench BENCH_ARGS="sft-packed dpo --pairs 3"     these

A pair is one run of each side, one after the other; pairs follow each other, so what else the machine does
hits both sides. Results go to benchmarks/results/peers.json, .md and .png; cases that are not asked for keep
what they had.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers import report
from benchmarks.peers.cases.case import Case, Setting, environment
from benchmarks.peers.cases.registry import CASES
from benchmarks.peers.environment import ensure_peers
from benchmarks.peers.machine import describe_machine
from benchmarks.peers.measure import CommandFailed, run_command
from jobs.demo.model import REPOSITORY, ensure_model

RESULTS = REPOSITORY / "benchmarks" / "results"
NUM_CORES = 2
DEADLINE_SECONDS = 900.0
LIMIT_DEADLINE_SECONDS = 120.0
# A run that fails, and one that ends without the files or the steps that it should have written.
FAILURES = (CommandFailed, OSError, ValueError)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run in progress is ended, too
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all without any")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side (3)")
    parser.add_argument(
        "--steps", type=int, default=2, help="measured steps of a run, after two of warm-up (2)"
    )
    parser.add_argument("--sides", nargs="+", help="of a case only these; the others keep what they had")
    parser.add_argument("--quick", action="store_true", help="--pairs 1 --steps 1")
    parser.add_argument(
        "--model", type=Path, help="another folder, to try the cases; without shares of the limit"
    )
    parser.add_argument("--keep", type=Path, help="keep logs and run folders here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"got {', '.join(unknown)}; wanted {', '.join(CASES)}")
    if options.quick:
        options.pairs, options.steps = 1, 1
    model = (options.model or ensure_model()).resolve()
    peer_python = ensure_peers()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        setting = Setting(
            folder=options.keep or Path(scratch),
            model=model,
            peer_python=peer_python,
            measured_steps=options.steps,
            threads=NUM_CORES,
            cores=tuple(sorted(os.sched_getaffinity(0))[:NUM_CORES]),
            deadline_seconds=DEADLINE_SECONDS,
        )
        setting.folder.mkdir(parents=True, exist_ok=True)
        for name in options.cases or CASES:
            save = partial(_save, options.out, name)
            measure_case(CASES[name], setting, options.pairs, options.sides, save)
    print((options.out / "peers.md").read_text())
    return 0


def measure_case(
    case: Case, setting: Setting, pairs: int, sides: list[str] | None, save: Callable[[dict[str, Any]], None]
) -> None:
    """Runs of each side and the machine's limit next to each pair; where a side fails, why. Saved after each
    run, so that what is interrupted keeps what it has measured.
    """
    chosen = {side: run for side, run in case.sides.items() if sides is None or side in sides}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in chosen}
    failures: dict[str, str] = {}
    limits: list[dict[str, float]] = []
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "measured_steps": setting.measured_steps,
        "model": setting.model.name,
        "machine": describe_machine(setting.peer_python),
        "runs": runs,
        "failures": failures,
        "limits": limits,
    }
    for pair in range(pairs):
        limits.append(_limit(setting))
        for side, run in chosen.items():
            if side in failures:
                continue
            label = re.sub(r"[^\w]+", "-", f"{case.name} {side} {pair + 1}")
            started = time.monotonic()
            try:
                measured = run(setting, label)
            except FAILURES as failure:
                failures[side] = f"{failure}"
                print(f"{label}: failed: {failure}", flush=True)
            else:
                runs[side].append(asdict(measured))
                seconds = time.monotonic() - started
                print(f"{label}: {measured.value:.2f} {case.unit} ({seconds:.0f} s)", flush=True)
            save(result)


def _limit(setting: Setting) -> dict[str, float]:
    """FLOP/s of matrix products, measured right before a pair."""
    answer = setting.folder / "limit.json"
    run_command(
        [str(setting.peer_python), "-m", "benchmarks.peers.products", str(answer), str(setting.threads)],
        env=environment(setting.threads),
        cwd=REPOSITORY,
        log=setting.folder / "limit.log",
        cores=setting.cores,
        deadline_seconds=LIMIT_DEADLINE_SECONDS,
    )
    return json.loads(answer.read_text())


def _save(out: Path, name: str, result: dict[str, Any]) -> None:
    file = out / "peers.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    before = results.get(name, {"runs": {}, "failures": {}})
    merged = dict(result)
    for part in ("runs", "failures"):  # of sides that were not asked for
        kept = {side: found for side, found in before[part].items() if side not in result["runs"]}
        merged[part] = kept | result[part]
    results[name] = merged
    ordered = {each: results[each] for each in CASES if each in results}
    file.write_text(json.dumps(ordered, indent=1) + "\n")
    (out / "peers.md").write_text(report.markdown(ordered))
    report.plot(ordered, out / "peers.png")


if __name__ == "__main__":
    sys.exit(main())
