"""What the variables of trainers and engines bring about in a process that has them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rayrlhf.placement.process_variables import memory_allocation, trainer_variables

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
