"""Models of the hub end to end: a hub on loopback, caches that begin empty, and a token that stays secret."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from rayrlhf.config.parse import dump_resolved
from rayrlhf.hub.access import Access
from rayrlhf.hub.ids import cache_folder
from rayrlhf.hub.local import ACTOR_PREFIX, HubSettings, HubSettingsActor, local_folder
from tests.integration.fake_cluster import fake_cluster
from tests.integration.policy_runs import tiny_run
from tests.local_hub import TOKEN, LocalHub, local_hub
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.ray

JOB_SECONDS = 900
MODELS = {"tiny/policy": False, "tiny/scorer": True}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """A policy and a reward model that only the holder of the token may have."""
    with local_hub() as hub:
        for name, is_scorer in MODELS.items():
            folder = tmp_path / "hub" / name
            make_tiny_model(folder, sequence_classification=is_scorer)
            hub.add(name, folder, gated=True)
        yield hub


def environment_without_hub() -> dict[str, str]:
    """This process's without what its tests say of the hub: they forbid it."""
    return {key: value for key, value in os.environ.items() if not key.startswith("HF_")}


def files_with(secret: str, folder: Path) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        try:
            if path.is_file() and secret.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:  # of a process that is just ending
            continue
    return found


def ray_logs_since(started: float) -> Iterator[Path]:
    for session in Path("/tmp/ray").glob("session_20*"):
        if (session / "logs").is_dir() and session.stat().st_mtime >= started - 1:
            yield session / "logs"


def fetched(home: Path) -> dict[str, bool]:
    """Which models' weights are in the cache."""
    found = (home / "hub").glob("models--*/snapshots/*/model.safetensors")
    return {path.parts[-4].removeprefix("models--").replace("--", "/"): True for path in found}


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ppo_with_models_of_the_hub_on_two_nodes_with_caches_of_their_own(
    hub: LocalHub, tmp_path: Path
) -> None:
    """PPO with a hub reward model, all caches empty. The driver alone has the token; each node fetches each
    file once; the commits stand in config.yaml; the token stands nowhere.
    """
    started = time.time()
    config = tiny_run(
        tmp_path,
        "tiny/policy",
        reward={"sources": [{"type": "model", "path": "tiny/scorer"}]},
        rollout={"prompts_per_step": 4, "sampling": {"max_new_tokens": 4}},
        train={"num_steps": 1, "num_workers": 2},
        placement={"preset": "colocate_all", "cpus_per_slot": 1, "gpus_per_slot": 1},
    )
    (tmp_path / "job.yaml").write_text(dump_resolved(config))
    homes = [tmp_path / "node0", tmp_path / "node1"]
    with fake_cluster(
        nodes=2,
        cpus=4,
        gpus=1,
        environment=environment_without_hub(),
        node_environments=[{"HF_HOME": str(home)} for home in homes],
    ) as cluster:
        driver = {
            **environment_without_hub(),
            "RAY_ADDRESS": cluster.address,
            "HF_HOME": str(tmp_path / "driver"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
        }
        job = subprocess.run(
            [sys.executable, "jobs/ppo.py", str(tmp_path / "job.yaml")],
            env=driver,
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
        )
        print(job.stdout, job.stderr)
        assert job.returncode == 0
        leaks = [leak for logs in ray_logs_since(started) for leak in files_with(TOKEN, logs)]
    run_path = tmp_path / "runs" / "tiny"
    resolved: Any = yaml.safe_load((run_path / "config.yaml").read_text())
    commits = {name: hub.repos["model", name].refs["main"] for name in MODELS}
    assert resolved["model"]["path"] == f"tiny/policy@{commits['tiny/policy']}"
    assert resolved["reward"]["sources"][0]["path"] == f"tiny/scorer@{commits['tiny/scorer']}"

    caches = [fetched(home) for home in homes]
    assert all("tiny/policy" in cache for cache in caches)
    assert any("tiny/scorer" in cache for cache in caches)
    assert fetched(tmp_path / "driver") == {}, "the driver's node loads no model"
    sent = hub.downloads()
    num_policies = sum("tiny/policy" in cache for cache in caches)
    num_scorers = sum("tiny/scorer" in cache for cache in caches)
    assert sent["tiny/policy/model.safetensors"] == num_policies == 2
    assert sent["tiny/scorer/model.safetensors"] == num_scorers
    assert max(sent.values()) <= 1 + len(homes)  # what is small also on the driver's node

    assert set(hub.tokens) == {TOKEN}, "every request had the driver's token"
    assert leaks == [] and files_with(TOKEN, tmp_path) == []
    assert TOKEN not in job.stdout + job.stderr
    assert "fetched tiny/policy: 1." in job.stdout and " on node " in job.stdout


@ray.remote(num_cpus=0)
def folder_on_worker(ref: str) -> str:
    return local_folder(ref)


def test_a_worker_fetches_with_the_token_that_the_driver_lends(
    ray_session: None, hub: LocalHub, tmp_path: Path
) -> None:
    commit = hub.repos["model", "tiny/policy"].refs["main"]
    ref, home = f"tiny/policy@{commit}", tmp_path / "worker"
    name = f"{ACTOR_PREFIX}test"
    actor: Any = ray.remote(HubSettingsActor).options(name=name, namespace="rayrlhf", num_cpus=0).remote()
    settings = HubSettings(
        Access(TOKEN, hub.url), str(cache_folder({"HF_HOME": str(tmp_path / "driver")})), True
    )
    ray.get(actor.set.remote(settings, frozenset({ref})), timeout=60)
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    task = folder_on_worker.options(runtime_env={"env_vars": environment})
    try:
        folders = ray.get([task.remote(ref) for _ in range(2)], timeout=120)
    finally:
        ray.kill(actor)
    assert set(folders) == {str(home / "hub/models--tiny--policy/snapshots" / commit)}
    assert set(hub.downloads().values()) == {1}, "two processes of a node, one download"
    assert set(hub.tokens) == {TOKEN}
