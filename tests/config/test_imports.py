"""An invalid configuration is reported at once: loading it imports nothing that takes seconds."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MAX_CPU_SECONDS = 2.0  # it takes 0.3; processor time, since a busy machine stretches the other
HEAVY = {"torch", "ray", "numpy", "pyarrow", "transformers", "datasets", "deepspeed", "vllm"}

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import rayrlhf.config
for module in pkgutil.iter_modules(rayrlhf.config.__path__, "rayrlhf.config."):
    importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_configuration_imports_nothing_heavy() -> None:
    done = run_python("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout))
    assert "rayrlhf.config.policy" in modules and "rayrlhf.config.parse" in modules
    assert not {name.partition(".")[0] for name in modules} & HEAVY


def test_the_job_reports_all_problems_before_it_imports_anything_heavy() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python(
        "-X",
        "importtime",
        "jobs/ppo.py",
        "jobs/configs/demo.yaml",
        "algorithm.kll_coef=0.1",
        "rollout.group_size=0",
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MAX_CPU_SECONDS
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time")
    }
    assert "pydantic" in imported and not imported & HEAVY
    output = "\n".join(line for line in lines if not line.startswith("import time"))
    assert output.startswith("2 problems in the configuration (jobs/configs/demo.yaml + 2 overrides):")
    assert "did you mean algorithm.kl_coef?" in output and "an integer >= 1" in output
    assert "Traceback" not in output


def test_the_job_has_help() -> None:
    done = run_python("jobs/ppo.py", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert (
        done.stdout.startswith("usage: python jobs/ppo.py CONFIG.yaml")
        and "rollout.group_size" in done.stdout
    )
