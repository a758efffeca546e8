"""What Ray costs around the engine: generation through Serve, and pushes of weights."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.peers.arithmetic import steady_rate
from benchmarks.peers.cases import policy
from benchmarks.peers.cases.case import OURS, WARMUP_STEPS, Case, Measured, Setting
from benchmarks.peers.measure import Ran
from rayrlhf.placement.process_variables import memory_allocation

BARE, COPY = "vLLM alone", "memcpy"


def measure_mine(
    setting: Setting, name: str, module: str, *words: str, num_engines: int = 1
) -> tuple[Any, Ran]:
    """A script of `mine/`, which gets a run's config; its answer."""
    config = policy.config(setting)
    config["model"]["dtype"] = "float32"  # vLLM alone would not round products
    config["run"] = {"name": name, "dir": str(setting.folder / "runs")}
    config["rollout"]["num_engines"] = num_engines
    config["placement"] = {"preset": "disaggregated", "cpus_per_slot": 0.5}
    file, answer = setting.folder / f"{name}.yaml", setting.folder / f"{name}.json"
    file.write_text(json.dumps(config))
    # The process that pushes stands for a trainer, so it has a trainer's malloc.
    variables = [f"{name}={value}" for name, value in memory_allocation().items()]
    python = ["env", *variables, sys.executable, "-m", f"benchmarks.peers.mine.{module}"]
    command = [*python, *words, str(file), str(answer)]
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


CASES = [
    Case(
        name="generation",
        title="Generation, 8 prompts x 4 samples x 64 tokens at once",
        unit="response tokens/s",
        higher_is_better=True,
        sides={OURS: generation("served"), BARE: generation("bare")},
        peer=BARE,
        compared="The same engine arguments, prompts, seeds and sampling, the checkpoint's weights. "
        "Ours is a rollout replica behind Serve, asked as a run's workers ask it.",
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
        compared="A push to both engines (pause, gather, transfer, load, resume), then a copy of as "
        "many bytes in the sender's memory, in turn in one process.",
        differs="A copy reads and writes the bytes once. A push gathers them into buckets, copies these into "
        "the object store, and each engine copies them twice: vLLM's layer-wise reload, which also serves "
        "quantised and stacked layers, fills a new layer and then copies it to the place of the old one. Six "
        "copies and 270 tensors handled in Python by each engine, all on two cores: 2 x memcpy is out of "
        "reach.",
    ),
]
