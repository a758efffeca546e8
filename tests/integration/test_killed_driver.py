"""kill -9 of the driver and `ray job stop` leave no app, placement group or actor of the run behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.local.head import LocalHead
from tests.integration.policy_runs import tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 400  # 60 to 150, as the machine is
GONE_SECONDS = 60  # it takes 4 to 8, and a look at it as long
NOTHING = {"apps": [], "groups": [], "actors": []}


def left_behind(head: LocalHead) -> dict[str, Any]:
    """A look that did not come to an end says where it hung, and is no answer: it equals nothing else."""
    environment = head.client_env() | {"RAY_ADDRESS": head.gcs_address}
    script = [sys.executable, "-m", "tests.integration.left_behind"]
    done = subprocess.run(script, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr)
        return {"apps": [], "groups": [], "actors": [], "failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def submit(head: LocalHead, config: Path, submission_id: str) -> None:
    command = ["ray", "job", "submit", "--no-wait", "--submission-id", submission_id, "--"]
    job = [sys.executable, str(REPOSITORY / "jobs/ppo.py"), str(config)]
    subprocess.run([*command, *job], env=head.client_env(), check=True, capture_output=True, timeout=60)


def driver_of(config: Path) -> psutil.Process:
    """The Python process that runs jobs/ppo.py with this config."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(config) in command and command[0].endswith("python") and command[1].endswith("jobs/ppo.py"):
            return process
    raise LookupError(f"no driver with {config}")


def wait_until(what: str, seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.5)


def kill(head: LocalHead, config: Path) -> None:
    driver_of(config).kill()


def terminate(head: LocalHead, config: Path) -> None:
    """What a scheduler does that gives a job time to leave."""
    driver = driver_of(config)
    driver.terminate()
    driver.wait(GONE_SECONDS)
    logs = subprocess.run(
        ["ray", "job", "logs", "terminate"], env=head.client_env(), capture_output=True, text=True
    )
    assert "stopped by SIGTERM; nothing is saved yet" in logs.stdout


def stop(head: LocalHead, config: Path) -> None:
    subprocess.run(
        ["ray", "job", "stop", "--no-wait", "stop"], env=head.client_env(), check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    with LocalHead(num_cpus=4, num_gpus=0, object_store_bytes=300_000_000) as found:
        yield found


@pytest.mark.parametrize("end", [kill, terminate, stop])
def test_nothing_outlives_the_driver(
    end: Callable[[LocalHead, Path], None], head: LocalHead, tmp_path: Path, tiny_model: str
) -> None:
    name = end.__name__
    run = tiny_run(tmp_path, tiny_model, train={"num_steps": 100_000})
    reward = {
        "type": "function",
        "function": f"{REPOSITORY}/tests/integration/policy_runs.py:share_of_vowels",
    }
    tree = run.model_dump(mode="json", exclude_unset=True) | {"reward": {"sources": [reward]}}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    submit(head, config, name)
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    wait_until(f"the first step before {name}", START_SECONDS, metrics.exists)
    alive = left_behind(head)
    assert alive["apps"] and alive["groups"] and "EngineActor" in alive["actors"]

    end(head, config)
    started = time.monotonic()
    wait_until(f"a clean cluster after {name}", GONE_SECONDS, lambda: left_behind(head) == NOTHING)
    print(f"{name}: nothing left after {time.monotonic() - started:.1f} s")
