"""What Ray costs around the engine: generation through Serve, pushes of weights, and the start of jobs."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peers.arithmetic import steady_rate
from benchmarks.peers.cases import policy, sft
from benchmarks.peers.cases.case import OURS, TRL, WARMUP_STEPS, Case, Measured, Setting
from benchmarks.peers.measure import Ran

BARE, COPY = "vLLM alone", "memcpy"
ENGINES_UP = re.compile(r"\brollout is up\b|\d:\d\d rollout$")


def measure_mine(
    setting: Setting, name: str, module: str, *words: str, num_engines: int = 1
) -> tuple[Any, Ran]:
    """A script of `mine/`, which gets a run's config; its answer."""
    config = policy.config(setting)
    config["run"] = {"name": name, "dir": str(setting.folder / "runs")}
    config["rollout"]["num_engines"] = num_engines
    config["placement"] = {"preset": "disaggregated", "cpus_per_slot": 0.5}
    file, answer = setting.folder / f"{name}.yaml", setting.folder / f"{name}.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", f"benchmarks.peers.mine.{module}", *words, str(file), str(answer)]
    ran = setting.run([*command, str(setting.num_steps), str(setting.threads)], name)
    return json.loads(answer.read_text()), ran


def generation(how: str) -> Callable[[Setting, str], Measured]:
    def run(setting: Setting, name: str) -> Measured:
        found, ran = measure_mine(setting, name, "generation", how)
        return Measured(
            value=steady_rate(found["tokens"], found["seconds"], warmup=WARMUP_STEPS),
            seconds=found["seconds"],
            tokens=found["tokens"],
            startup_seconds=found["began_at"] - ran.started_at,
            peak_bytes=ran.peak_bytes,
        )

    return run


def push(setting: Setting, name: str) -> Measured:
    """Leaves the durations of the copies in a file for `copy`, which were measured between the pushes."""
    found, ran = measure_mine(setting, name, "push", num_engines=2)
    (setting.folder / "copies.json").write_text(json.dumps(found))
    return Measured(
        value=statistics.median(found["pushes"][WARMUP_STEPS:]),
        seconds=found["pushes"],
        startup_seconds=found["began_at"] - ran.started_at,
        peak_bytes=ran.peak_bytes,
        notes={"bytes": found["bytes"], "fallbacks": found["fallbacks"]},
    )


def copy(setting: Setting, name: str) -> Measured:
    found = json.loads((setting.folder / "copies.json").read_text())
    return Measured(value=statistics.median(found["copies"][WARMUP_STEPS:]), seconds=found["copies"])


def start_of(run: Callable[[Setting, str], Measured]) -> Callable[[Setting, str], Measured]:
    """Seconds from the command to the first step, of a run of two steps."""

    def started(setting: Setting, name: str) -> Measured:
        measured = run(replace(setting, measured_steps=1), name)
        assert measured.startup_seconds is not None
        return replace(measured, value=measured.startup_seconds)

    return started


def start_of_rollouts(setting: Setting, name: str) -> Measured:
    """To the moment when the engine is up and the worker asks it."""
    measured = start_of(policy.ours)(setting, name)
    log = (Path(setting.folder) / f"{name}.log").read_text().splitlines()
    stamps = [float(line.split()[0]) for line in log if ENGINES_UP.search(line)]
    return replace(measured, value=max(stamps))


CASES = [
    Case(
        name="generation",
        title="Generation, 8 prompts x 4 samples x 64 tokens at once",
        unit="response tokens/s",
        higher_is_better=True,
        sides={OURS: generation("served"), BARE: generation("bare")},
        peer=BARE,
        compared="The same engine arguments, prompts, seeds and sampling, the checkpoint's weights. Ours "
        "is a rollout "
        "replica behind Serve, asked as a run's workers ask it.",
        differs="vLLM alone runs in the process that measures, which steps it.",
        ideal=1.0,
    ),
    Case(
        name="push",
        title="Weights of the model in fp32 (538 MB) to two engines, against copying as many bytes in memory",
        unit="s",
        higher_is_better=False,
        sides={OURS: push, COPY: copy},
        peer=COPY,
        compared="A push to both engines (pause, gather, transfer, load, resume), then a copy of as many "
        "bytes in the "
        "sender's memory, in turn in one process.",
        differs="A copy reads and writes the bytes once. A push to two engines has to write them into "
        "three memories.",
    ),
    Case(
        name="start-sft",
        title="From `python jobs/sft.py` to the first step",
        unit="s",
        higher_is_better=False,
        sides={
            OURS: start_of(sft.ours),
            TRL: start_of(lambda setting, name: sft.trl(setting, name, packing=False)),
        },
        peer=TRL,
        compared="From the command to the beginning of the first step.",
        differs="Ours checks, starts Ray, places and loads; TRL loads in one process.",
    ),
    Case(
        name="start-grpo",
        title="From `python jobs/ppo.py` with GRPO to the first rollout",
        unit="s",
        higher_is_better=False,
        sides={OURS: start_of_rollouts, TRL: start_of(policy.trl_grpo)},
        peer=TRL,
        compared="From the command to the first request to a running engine.",
        differs="Ours also starts Ray, Serve and a vLLM engine.",
    ),
]
