"""What only a GPU can show: `make gpu-check`. Without one it says so and exits 0.

    python -m benchmarks.gpu_check [--device cuda|cpu] [--only NAME ...] [--out FILE] [--budget SECONDS]

Each step is a process with a deadline and prints one JSON line (benchmarks/gpu_check/results.py), which is
also appended to the file; a page next to it has all numbers. A second start leaves out the steps in the file
that succeeded with this source, on this device, with these versions. A step whose packages are missing is
skipped; one that fails stops no other. torch and transformers are enough for the steps that matter most;
`registry.py` says what the others need.

`--device cpu` runs the same code, small, on the CPU: that is how gpu-check itself is tested.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_check.host import ROOT, Host, find_host
from benchmarks.gpu_check.registry import STEPS
from benchmarks.gpu_check.results import Result, append, page, result_of, succeeded, table
from benchmarks.gpu_check.runner import Options, Step, run_step

RESULTS = ROOT / "benchmarks/results"
RUNS = ROOT / "runs/gpu_check"
SHORTEST_SECONDS = 10.0  # no step is started with less left of the budget
CPU_DEADLINES = 4.0  # times those of a GPU: other work may share the cores


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    options = _parse(arguments, steps)
    host = find_host(options.device)
    if host is None:
        print("No CUDA device here: nothing was run. --device cpu runs the same steps, small, on the CPU.")
        return 0
    out = options.out or _default_out(options.device, host)
    done = {} if options.again else succeeded(out, host)
    stop = time.monotonic() + options.budget
    results: list[Result] = []
    if options.device == "cpu":
        steps = [replace(step, seconds=CPU_DEADLINES * step.seconds) for step in steps]
    for step in steps:
        if step.name not in options.only:
            continue
        if step.name in done:
            results.append(done[step.name])
            continue
        seconds_left = stop - time.monotonic()
        if seconds_left < SHORTEST_SECONDS:
            result = result_of(host, step.name, None, f"the budget of {options.budget:g} s is used up")
        else:
            result = run_step(
                step, host, Options(options.device, options.traces, options.cumem), seconds_left=seconds_left
            )
        results.append(result)
        print(append(out, result), flush=True)
    print(f"\n{table(results)}\n\n{out}")
    latest = succeeded(out, host) | {result.name: result for result in results}
    in_order = [latest[step.name] for step in steps if step.name in latest]
    out.with_suffix(".md").write_text(page(host, in_order))
    return 1 if any(result.ok is False for result in results) else 0


def _default_out(device: str, host: Host) -> Path:
    """Results on a GPU are kept with the other benchmarks', named after the device."""
    if device == "cpu":
        return RUNS / "cpu.jsonl"
    name = re.sub(r"[^a-z0-9]+", "-", host.device.lower()).strip("-")
    return RESULTS / f"gpu_check_{name}.jsonl"


def _parse(arguments: Sequence[str] | None, steps: Sequence[Step]) -> argparse.Namespace:
    names = [step.name for step in steps]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="What only a GPU can show."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--out", type=Path, help="JSON lines (default: benchmarks/results/gpu_check_<device>.jsonl)"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of all steps")
    parser.add_argument("--again", action="store_true", help="also the steps that have succeeded")
    parser.add_argument("--traces", type=Path, default=RUNS / "traces", help="folder of profiler traces")
    parser.add_argument(
        "--cumem", type=Path, help="folder with vLLM's csrc/cumem_allocator*, if it isn't installed"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
