"""Where the time goes until a job's first step: SFT, and PPO with an engine, on a tiny model.

    .venv/bin/python -m benchmarks.startup

Each job runs as a user runs it, `python jobs/sft.py CONFIG`, with a local Ray. Its console's lines are
stamped when they arrive, and every process that the job starts is looked at four times per second: when it
was there first, and how many seconds of CPU it had taken when the first step ended. The tiny model makes
reading weights, forward and backward free, so what is left is the start itself.

The first token is the end of the first step's rollouts, which are of one token each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.update_memory import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
LOOK_SECONDS = 0.25
GRACE_SECONDS = 60.0  # for a job to stop
ROWS = [{"prompt": f"say {i}", "response": f"{i} it is", "topic": i} for i in range(64)]
REWARD = "tests.integration.policy_runs:share_of_vowels"
COMMON: dict[str, Any] = {"checkpoint": {"export": False}, "observe": {"console": "lines"}}
JOBS: dict[str, dict[str, Any]] = {
    "sft": {
        "job": "sft",
        "data": {"prompt_key": "prompt", "response_key": "response", "max_tokens": 128},
        "train": {
            "num_steps": 1,
            "samples_per_step": 32,
            "zero_stage": 0,
            "max_tokens_per_micro_batch": 1024,
        },
    },
    "ppo": {
        "data": {"max_prompt_tokens": 64},
        "critic": {"lr": 1e-3},
        "algorithm": {"kl_coef": 0.001},
        "rollout": {"prompts_per_step": 32, "kv_cache_bytes": 64 << 20, "sampling": {"max_new_tokens": 1}},
        "reward": {"sources": [{"type": "function", "function": REWARD}]},
        "placement": {"preset": "colocate_all", "cpus_per_slot": 0.5},
        "train": {"num_steps": 1, "zero_stage": 0, "max_tokens_per_micro_batch": 1024},
    },
}


class Watched:
    """A running job: its lines and its processes."""

    def __init__(self, job: str, config: Path) -> None:
        self.started = time.time()
        self.lines: list[tuple[float, str]] = []
        self.processes: dict[psutil.Process, dict[str, Any]] = {}
        script = "jobs/ppo.py" if job == "ppo" else f"jobs/{job}.py"
        own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        path = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
        self.child = subprocess.Popen(
            [sys.executable, script, str(config)],
            cwd=ROOT,
            env=own | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def seconds(self) -> float:
        return time.time() - self.started

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.append((self.seconds, line.rstrip()))

    def look(self) -> None:
        for process in [psutil.Process(self.child.pid), *_descendants(self.child.pid)]:
            try:
                times = process.cpu_times()
                name = _name(process.cmdline())
            except psutil.Error:
                continue
            seen = self.processes.setdefault(process, {"first": self.seconds})
            busy = not name.endswith("IDLE")  # a process is named after what it does, or did last
            seen |= {"cpu": times.user + times.system, "name": name if busy else seen.get("name", name)}

    def stop(self) -> None:
        self.child.send_signal(signal.SIGTERM)
        self.child.wait(GRACE_SECONDS)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _name(command: list[str]) -> str:
    """`RayTrainWorker`, `gcs_server`, `jobs/sft.py`."""
    text = " ".join(command).strip()
    if text.startswith("ray::"):
        return text.removeprefix("ray::").partition(".")[0].partition(":")[0].split("(")[0] or "IDLE"
    for word in command:
        if word.endswith(".py") or word.startswith("rayrlhf."):
            return word if word.startswith(("jobs", "rayrlhf")) else Path(word).name
    return Path(command[0]).name if command else "ended"


def measure(job: str, folder: Path, model: str, limit_seconds: float) -> dict[str, Any]:
    """Run the job until its first step is reported; returns seconds, lines and processes."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = COMMON | JOBS[job]
    settings["run"] = {"name": job, "dir": str(folder / "runs")}
    settings["model"] = {"path": model}
    settings["data"] = settings["data"] | {"train": str(rows)}
    config = folder / f"{job}.yaml"
    config.write_text(yaml.safe_dump(settings))
    metrics = folder / "runs" / job / "metrics.jsonl"
    watched = Watched(job, config)
    try:
        while not (metrics.exists() and metrics.read_text().count("\n")):
            if watched.child.poll() is not None or watched.seconds > limit_seconds:
                raise SystemExit(
                    "\n".join([f"{job}: no step", *(f"{at:.1f} {line}" for at, line in watched.lines)])
                )
            watched.look()
            time.sleep(LOOK_SECONDS)
        watched.look()
        end = watched.seconds
    finally:
        if watched.child.poll() is None:
            watched.stop()
    row = json.loads(metrics.read_text().splitlines()[0])
    answer: dict[str, Any] = {"job": job, "first_step": end, "lines": watched.lines}
    if "time/rollout" in row:
        answer["first_token"] = end - row["time/step"] + row["time/rollout"]
    by_start = sorted(watched.processes.values(), key=lambda process: process["first"])
    answer["processes"] = [process for process in by_start if process["cpu"] >= 0.1]
    answer["cpu_seconds"] = sum(process["cpu"] for process in by_start)
    return answer


def as_markdown(results: list[dict[str, Any]], where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    parts = [
        "# Where the start-up time goes",
        "",
        f"{where['cpu']}, {where['cores']} cores, load average {where['load_average']} before; {versions}. "
        f"`{where['command']}`; how it is measured stands in `benchmarks/startup.py`.",
    ]
    for found in results:
        token = f"first token after {found['first_token']:.1f} s, " if "first_token" in found else ""
        parts += [
            "",
            f"## {found['job']}: {token}first step after {found['first_step']:.1f} s",
            "",
            f"{found['cpu_seconds']:.0f} seconds of CPU in {len(found['processes'])} processes.",
            "",
            "| seconds | console |",
            "|---:|---|",
        ]
        shown = [(at, line) for at, line in found["lines"] if at <= found["first_step"] + LOOK_SECONDS]
        parts += [f"| {at:.1f} | {line.strip()} |" for at, line in shown]
        parts += ["", "| process | starts at | CPU seconds |", "|---|---:|---:|"]
        parts += [f"| {p['name']} | {p['first']:.1f} | {p['cpu']:.1f} |" for p in found["processes"]]
    return "\n".join([*parts, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time goes until a job's first step.")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--limit-seconds", type=float, default=240.0, help="until a job's first step")
    parser.add_argument("--out", type=Path, default=RESULTS / "startup", help="without suffix")
    options = parser.parse_args()
    where: dict[str, Any] = machine(0) | {"command": ".venv/bin/python -m benchmarks.startup"}
    where["versions"] |= {"ray": version("ray")}
    from tests.tiny_model import make_tiny_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_model(folder / "model")
        results = [measure(job, folder, model, options.limit_seconds) for job in options.jobs]
    report = as_markdown(results, where)
    options.out.with_suffix(".md").write_text(report)
    options.out.with_suffix(".json").write_text(json.dumps(where | {"jobs": results}, indent=2) + "\n")
    print(report)


if __name__ == "__main__":
    main()
