"""What a case is: how each side runs, what is counted, and what is not the same on both sides."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.arithmetic import steady_rate
from benchmarks.peers.measure import Ran, run_command
from jobs.demo.model import REPOSITORY
from rayrlhf.models.cpu_products import has_bf16_units

WARMUP_STEPS = 2  # on every side: they touch the memory of all later ones for the first time
STEP_LINE = re.compile(r"\bstep (\d+)/\d+\b")
OURS, CONTROL, TRL = "ours", "control", "TRL"
BF16 = ", bf16"  # of a peer that autocasts


@dataclass(frozen=True)
class Measured:
    """One run of one side: its steady rate or duration, and what was seen on the way."""

    value: float  # in the case's unit
    seconds: list[float] = field(default_factory=list)  # of each step, warm-up included
    tokens: list[float] = field(default_factory=list)  # real ones of each step
    losses: list[float] = field(default_factory=list)  # of each step: both sides train on such rows
    startup_seconds: float | None = None  # from the command to the first step
    peak_bytes: int = 0
    parts: dict[str, float] = field(default_factory=dict)  # e.g. seconds generating, per step
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """How the runs are made: alike for all cases."""

    folder: Path  # scratch
    model: Path
    peer_python: Path
    measured_steps: int
    threads: int
    cores: tuple[int, ...]
    deadline_seconds: float

    @property
    def num_steps(self) -> int:
        return WARMUP_STEPS + self.measured_steps

    def run(self, command: Sequence[str], log: str, ends_at: Callable[[str], bool] = lambda _: False) -> Ran:
        return run_command(
            command,
            env=environment(self.threads),
            cwd=REPOSITORY,
            log=self.folder / f"{log}.log",
            cores=self.cores,
            deadline_seconds=self.deadline_seconds,
            ends_at=ends_at,
        )


Side = Callable[[Setting, str], Measured]  # (setting, name of the run) -> what it measured


@dataclass(frozen=True)
class Case:
    name: str
    title: str
    unit: str
    higher_is_better: bool
    sides: Mapping[str, Side]  # in the order of a pair's runs; ours is the first
    peer: str  # the side that ours is compared with
    compared: str  # what is the same, and what is counted
    differs: str  # what is not the same
    trains_all_weights: bool = False  # then the share of the product limit is known
    ideal: float | None = None  # of the ratio


def both_precisions(side: str, run: Callable[..., Measured]) -> dict[str, Side]:
    """A peer in fp32 and, on CPUs with units for it, with bf16 autocast. Ours chooses by itself (model.dtype:
    auto).
    """
    return {side: run} | ({side + BF16: partial(run, bf16=True)} if has_bf16_units() else {})


def environment(threads: int) -> dict[str, str]:
    """Of every measured command: as many threads on both sides, no network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME")}
    return kept | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def run_job(
    setting: Setting, name: str, script: str, config: dict[str, Any]
) -> tuple[list[dict[str, Any]], Ran]:
    """A job as a user runs it, until the line of its last step; returns its metrics' rows of steps.

    The checkpoint that follows is not waited for: the peers save none.
    """
    config = {**config, "run": {"name": name, "dir": str(setting.folder / "runs")}}
    file = setting.folder / f"{name}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    last = re.compile(rf"\bstep {setting.num_steps}/{setting.num_steps}\b")
    command = [sys.executable, f"jobs/{script}.py", str(file)]
    ran = setting.run(command, name, lambda line: last.search(line) is not None)
    lines = (setting.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "time/step" in row], ran


def from_steps(
    rows: Sequence[Mapping[str, Any]], ran: Ran, *, parts: Sequence[str] = (), per_second: bool = True
) -> Measured:
    """Of a job's metrics: real tokens per second of whole steps, or seconds per step."""
    seconds = [row["time/step"] for row in rows]
    tokens = [row["data/tokens"] for row in rows]
    rate = steady_rate(tokens if per_second else [1.0] * len(rows), seconds, warmup=WARMUP_STEPS)
    stamps = [line.seconds for line in ran.lines if STEP_LINE.search(line.text)]
    measured = rows[WARMUP_STEPS:]
    wall = stamps[-1] - stamps[WARMUP_STEPS - 1] if len(stamps) == len(rows) else float("nan")
    return Measured(
        value=rate if per_second else 1 / rate,
        seconds=seconds,
        tokens=tokens,
        losses=[row["loss/model"] for row in rows if "loss/model" in row],
        startup_seconds=stamps[0] - seconds[0] if stamps else None,
        peak_bytes=ran.peak_bytes,
        parts={part: sum(row.get(part, 0.0) for row in measured) / len(measured) for part in parts},
        # The metrics' durations against the clock between the lines of the first and the last step.
        notes={"wall_over_metrics": wall / sum(seconds[WARMUP_STEPS:])},
    )


def run_script(
    setting: Setting,
    name: str,
    module: str,
    options: Mapping[str, Any],
    *,
    per_second: bool = True,
    bf16: bool = False,
) -> Measured:
    """A script of `theirs/` in the peers' environment; the same numbers from its answer."""
    answer = setting.folder / f"{name}.json"
    command = [str(setting.peer_python), "-m", f"benchmarks.peers.theirs.{module}"]
    shared = {
        "model": setting.model,
        "answer": answer,
        "steps": setting.num_steps,
        "threads": setting.threads,
        "bf16": int(bf16),
    }
    for key, value in {**shared, **options}.items():
        command += [f"--{key}", str(value)]
    ran = setting.run(command, name)
    found = json.loads(answer.read_text())
    counted = found["tokens"] if per_second else [1.0] * len(found["seconds"])
    rate = steady_rate(counted, found["seconds"], warmup=WARMUP_STEPS)
    return Measured(
        value=rate if per_second else 1 / rate,
        seconds=found["seconds"],
        tokens=found["tokens"],
        losses=found["losses"],
        startup_seconds=found["began_at"] - ran.started_at,
        peak_bytes=ran.peak_bytes,
        parts=found.get("parts", {}),
        notes=found.get("notes", {}),
    )
