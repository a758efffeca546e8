"""What the variables of trainers and engines bring about in a process that has them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from rayrlhf.config.placement import PlacementConfig
from rayrlhf.placement.plan import Units, place
from rayrlhf.placement.process_variables import (
    engine_variables,
    memory_allocation,
    threads_of,
    trainer_variables,
)
from rayrlhf.placement.slots import Slot, Slots

# In a thread, as Ray Train runs a worker's function: other threads' arenas keep no large pieces.
FAULTS_OF_A_SECOND_STEP = """
import resource, threading, numpy

def step():
    arrays = [numpy.ones(25_000_000) for _ in range(3)]  # 200 MB each

def run():
    global faults
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

thread = threading.Thread(target=run)
thread.start()
thread.join()
print(faults)
"""


def faults(variables: dict[str, str]) -> int:
    command = [sys.executable, "-c", FAULTS_OF_A_SECOND_STEP]
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | variables
    return int(subprocess.run(command, env=env, capture_output=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_trainers_memory_is_kept_for_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    variables = trainer_variables(1, "rayrlhf.supervised.loop", on_gpu=False)
    assert faults({"GLIBC_TUNABLES": variables["GLIBC_TUNABLES"]}) < 20 < 250 < faults({})


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    assert memory_allocation() == {}


def slots_of(units: dict[str, int], nodes: list[str], *, gpus: bool) -> Slots:
    spec = place({role: Units(count) for role, count in units.items()}, PlacementConfig(cpus_per_slot=6.5))
    group: Any = None
    table = tuple(
        Slot(i, node, "0" if gpus else None, f"GPU-{i}" if gpus else None) for i, node in enumerate(nodes)
    )
    return Slots("run", spec, group, int(gpus), table)


def test_threads_are_shared_by_the_processes_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers on node a, one on b, an engine on b; the driver's node has 24 cores, as the others."""
    monkeypatch.setattr(os, "cpu_count", lambda: 24)
    slots = slots_of({"actor": 3, "rollout": 1}, ["a", "a", "b", "b"], gpus=False)
    assert threads_of(slots, "actor") == 12
    assert threads_of(slots, "rollout") == 24
    assert threads_of(slots, "actor", "rollout") == 12


def test_on_gpus_a_process_has_the_cores_of_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the driver's node has: here one core."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    slots = slots_of({"actor": 2, "rollout": 1}, ["a", "a", "b"], gpus=True)
    assert threads_of(slots, "actor") == threads_of(slots, "rollout") == 6


def test_workers_and_engines_reach_the_hub_unless_the_driver_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> list[str | None]:
        workers = trainer_variables(1, "rayrlhf.policy.loop", on_gpu=True), engine_variables()
        return [variables.get("HF_HUB_OFFLINE") for variables in workers]

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert offline() == [None, None]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline() == ["1", "1"]
