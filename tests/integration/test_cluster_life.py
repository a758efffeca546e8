"""Concurrent jobs on one cluster of several nodes, and nodes that die under them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.parse import dump_resolved
from rayrlhf.config.policy import PolicyRunConfig
from tests.integration.fake_cluster import FakeCluster, fake_cluster
from tests.integration.policy_runs import tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
RUN_SECONDS = 900.0  # two runs start side by side on two cores, and some machines are slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    """Two nodes with one GPU each."""
    with fake_cluster(nodes=2, cpus=4, gpus=1) as found:
        yield found


def one_slot_run(folder: Path, model: str, name: str, **changes: Any) -> PolicyRunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / "runs")},
        "rollout": {"prompts_per_step": 8},
        "observe": {"console": "lines", "tensorboard": False},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    return tiny_run(folder, model, **sections)


Start = Callable[[PolicyRunConfig], subprocess.Popen[str]]


@pytest.fixture
def start(cluster: FakeCluster) -> Iterator[Start]:
    """Starts a job on the cluster; what a failed test leaves running is stopped."""
    jobs: list[subprocess.Popen[str]] = []

    def start_job(config: PolicyRunConfig) -> subprocess.Popen[str]:
        path = Path(config.run.dir).parent / f"{config.run.name}.yaml"
        path.write_text(dump_resolved(config))
        job = subprocess.Popen(
            [sys.executable, "jobs/ppo.py", str(path)],
            cwd=REPOSITORY,
            env=cluster.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        jobs.append(job)
        return job

    yield start_job
    for job in jobs:
        if job.poll() is None:
            job.terminate()
            job.communicate(timeout=60)


def metrics_of(config: PolicyRunConfig) -> list[dict[str, float]]:
    path = Path(config.run.path) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if "loss/actor" in row]


def losses(config: PolicyRunConfig) -> list[float]:
    return [row["loss/actor"] for row in metrics_of(config)]


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_jobs_do_not_disturb_each_other_and_one_too_many_is_refused_at_once(
    start: Start, tiny_model: str, tmp_path: Path
) -> None:
    first, second = (
        one_slot_run(tmp_path / name, tiny_model, name, train={"num_steps": 2})
        for name in ("first", "second")
    )
    jobs = [start(config) for config in (first, second)]
    wait_until(lambda: (Path(second.run.path) / "placement.json").is_file(), jobs[1])
    wait_until(lambda: (Path(first.run.path) / "placement.json").is_file(), jobs[0])

    third = start(one_slot_run(tmp_path / "third", tiny_model, "third"))
    assert third.stdout is not None
    for line in third.stdout:
        if "joined the cluster" in line:
            break
    joined = time.monotonic()
    refused = next(line for line in third.stdout if "but the cluster has free" in line)
    seconds = time.monotonic() - joined
    # 2.5 s on an idle machine, which another job that is just ending gets to give its slots back.
    assert seconds < 20, f"a job that does not fit is refused at once, not after {seconds:.1f} s"
    print(f"refused after {seconds:.1f} s")
    assert third.wait(timeout=60) == 2
    assert "needs 1 GPU (1 slot x 1) but the cluster has free 0" in refused

    for job in jobs:
        output, _ = job.communicate(timeout=RUN_SECONDS)
        assert job.returncode == 0, output
    assert len(losses(first)) == 2
    assert losses(first) == pytest.approx(losses(second), rel=1e-5), "same seed, same data, same numbers"


def test_a_critic_that_is_killed_takes_the_actor_back_to_the_checkpoint_with_it(
    start: Start, tiny_model: str, tmp_path: Path
) -> None:
    """The run ends with the numbers of one that nothing has happened to."""
    undisturbed, killed = (
        one_slot_run(
            tmp_path,
            tiny_model,
            name,
            critic={"lr": 1e-3, "location": location},
            checkpoint={"every_steps": 1},
            train={"num_steps": 4},
        )
        for name, location in (("undisturbed", "worker"), ("killed", "trainer"))
    )
    job = start(killed)
    other = start(undisturbed)
    wait_until(lambda: len(losses(killed)) >= 2, job)
    os.kill(pid_of(killed, "critic"), signal.SIGKILL)
    for process in (job, other):
        output, _ = process.communicate(timeout=RUN_SECONDS)
        assert process.returncode == 0, output
    by_step = {row["step"]: row for row in metrics_of(killed)}  # repeated steps: the later time
    assert sorted(by_step) == [1, 2, 3, 4]
    for wanted in metrics_of(undisturbed):
        for key in ("loss/actor", "loss/critic", "reward/mean"):
            assert by_step[wanted["step"]][key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), key


def pid_of(config: PolicyRunConfig, role: str) -> int:
    workers = json.loads((Path(config.run.path) / "placement.json").read_text())["workers"]
    return next(worker["pid"] for worker in workers if worker["role"] == role)


def test_a_spare_takes_the_place_of_a_node_that_died(
    cluster: FakeCluster, start: Start, tiny_model: str, tmp_path: Path
) -> None:
    """Both nodes have a worker and an engine; one of them goes, and a new one joins."""
    config = one_slot_run(
        tmp_path,
        tiny_model,
        "spare",
        rollout={"num_engines": 2},
        train={"num_workers": 2, "num_steps": 5, "max_failures": 2},
        checkpoint={"every_steps": 1},
    )
    job = start(config)
    wait_until(lambda: len(losses(config)) >= 2, job)
    placement = Path(config.run.path) / "placement.json"
    before = [slot["node"] for slot in json.loads(placement.read_text())["slots"]]
    cluster.kill_node(before[1])
    spare = cluster.add_node()
    output, _ = job.communicate(timeout=RUN_SECONDS)
    assert job.returncode == 0, output
    assert "died; waiting for a spare" in output, output

    after = json.loads(placement.read_text())
    assert [slot["node"] for slot in after["slots"]] == [before[0], spare]
    locations = {(worker["role"], worker["unit"]): worker["node"] for worker in after["workers"]}
    assert locations == {
        ("actor", 0): before[0],
        ("actor", 1): spare,
        ("rollout", 0): before[0],
        ("rollout", 1): spare,
    }
    summary = json.loads((Path(config.run.path) / "summary.json").read_text())
    assert summary["steps"] == 5
