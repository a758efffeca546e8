"""Processes that are started before their actors, with a role's modules imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rayrlhf.placement import preload

STARTED = """
import json, os, sys, time
import psutil, ray
from rayrlhf.placement.preload import enable, preloading, prestart

enable()
from rayrlhf.runtime.local_ray import local_ray

class Actor:
    def about(self):
        return "rayrlhf.capacity.gpu_types" in sys.modules, os.getpid()

def processes():
    return psutil.Process().children(recursive=True)

def preloaded():
    found = []
    for process in processes():
        try:
            if "gpu_types" in process.environ().get("RAYRLHF_PRELOAD_MODULE", ""):
                found.append(process.pid)
        except psutil.Error:
            continue  # it has just ended
    return found

def start(variables):
    actor = ray.remote(Actor).options(num_cpus=0, runtime_env={"env_vars": variables}).remote()
    return ray.get(actor.about.remote())

with local_ray("test"):
    variables = preloading("rayrlhf.capacity.gpu_types") | {"ROLE": "trainer"}
    prestart(variables, 1)
    while not preloaded():
        time.sleep(0.2)
    time.sleep(1)
    before = preloaded()
    first, second = start(variables), start(variables)
    services = [" ".join(p.cmdline()) for p in processes()]
print(json.dumps({"before": before, "first": first, "second": second, "services": services}))
"""


def test_modules_are_named_only_by_a_driver_that_starts_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(preload.ENABLED, raising=False)
    assert preload.preloading("decimal") == {} and preload.data_task_options() == {}
    monkeypatch.setenv(preload.ENABLED, "1")
    variables = preload.preloading("decimal")
    assert variables[preload.MODULE] == "decimal"
    assert preload.data_task_options() == {
        "runtime_env": {"env_vars": preload.preloading(preload.TOKENIZERS)}
    }


def test_a_process_imports_the_module_that_its_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(preload.MODULE, "wave")
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    preload.preload()
    assert "wave" in sys.modules


@pytest.mark.ray
def test_an_actor_gets_the_process_that_was_started_for_it() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", STARTED], env=own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    imported, process = seen["first"]
    assert imported and [process] == seen["before"], "started before it was asked for"
    imported, process = seen["second"]
    assert imported and process not in seen["before"], "there was one only; the next actor's imports it, too"
    for service in ("monitor.py", "log_monitor.py", "dashboard/dashboard.py"):
        assert not any(service in command for command in seen["services"]), f"{service} is not needed"
