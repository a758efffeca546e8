"""Every way of placing the roles on a cluster of several nodes with (counted) GPUs.

The plan holds, and it does not change the numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.config.parse import dump_resolved
from rayrlhf.config.policy import PolicyRunConfig
from tests.integration.fake_cluster import FakeCluster, fake_cluster
from tests.integration.policy_runs import tiny_run
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
RUN_SECONDS = 900  # thirty processes start on two cores, and some machines are slow
# By hand, for 2 actor workers, 2 critic workers, 2 engines, 1 reference and 2 reward replicas: whose slots
# begin where. Roles that live in the actor's workers have none.
FIRST_SLOTS = {
    "disaggregated": {"actor": 0, "critic": 2, "rollout": 4, "ref": 6, "reward:0": 7},
    "colocate_actor_ref": {"actor": 0, "critic": 2, "rollout": 4, "reward:0": 6},
    "colocate_critic_reward": {"actor": 0, "critic": 2, "rollout": 4, "reward:0": 2, "ref": 6},
    "colocate_actor_ref+critic_reward": {"actor": 0, "critic": 2, "rollout": 4, "reward:0": 2},
    "colocate_all": {"actor": 0, "rollout": 0, "reward:0": 0},
    "pools": {"actor": 0, "rollout": 0, "critic": 2, "ref": 2, "reward:0": 4},
}
POOLS = [{"name": "policy", "roles": ["actor", "rollout"]}, {"name": "judge", "roles": ["critic", "ref"]}]


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with fake_cluster(nodes=3, cpus=4, gpus=3) as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return (
        make_tiny_model(folder / "policy"),
        make_tiny_model(folder / "reward", seed=1, sequence_classification=True),
    )


def preset_run(folder: Path, models: tuple[str, str], preset: str, **changes: Any) -> PolicyRunConfig:
    folder.mkdir(parents=True)
    policy, reward = models
    base: dict[str, Any] = {
        "placement": {
            "preset": preset,
            "cpus_per_slot": 0.5,
            **({"pools": POOLS} if preset == "pools" else {}),
        },
        "rollout": {"num_engines": 2, "prompts_per_step": 8},
        "reward": {"sources": [{"type": "model", "path": reward, "num_replicas": 2}]},
        "train": {"num_steps": 2, "num_workers": 2},
        "observe": {"console": "lines", "tensorboard": False},
        "eval": {},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return tiny_run(folder, policy, **base)


def run_on(cluster: FakeCluster, config: PolicyRunConfig) -> subprocess.CompletedProcess[str]:
    path = Path(config.run.dir).parent / "config.yaml"
    path.write_text(dump_resolved(config))
    return subprocess.run(
        [sys.executable, "jobs/ppo.py", str(path)],
        cwd=REPOSITORY,
        env=cluster.environment(),
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )


def metrics_of(config: PolicyRunConfig) -> list[dict[str, float]]:
    lines = (Path(config.run.path) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss/actor" in row]


@pytest.fixture(scope="module")
def numbers() -> dict[str, list[dict[str, float]]]:
    """Metrics of every step, by preset, as the tests below come to them."""
    return {}


def check_turns(trace: Path) -> None:
    """In both steps engines sleep before the optimizer is back, and wake in two stages after it has gone."""
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)
    stages: list[tuple[set[str], str]] = []  # who did the same thing in a row
    for event in events:
        what = event["what"].partition(",")[0]
        if stages and stages[-1][1] == what:
            stages[-1][0].add(event["who"])
        else:
            stages.append(({event["who"]}, what))
    engines, trainers = {"engine 0", "engine 1"}, {"trainers"}
    assert stages == [
        stage
        for version in (1, 2)
        for stage in (
            (engines, "asleep"),
            (trainers, "optimizer and gradients reloaded"),
            (trainers, "optimizer and gradients offloaded"),
            (engines, "awake: weights"),
            (engines, f"loaded version {version}"),
            (engines, "awake: kv_cache"),
        )
    ]


# How weights travel, in the place of the object store.
ROUTES = {"disaggregated": "gloo", "colocate_all": "ipc"}
SHARED = ("colocate_all", "pools")  # the actor shares its slots with the engines
ALWAYS = ("colocate_all",)  # all roles share; `make test-long` runs all and compares their numbers


@pytest.mark.parametrize(
    "preset",
    [pytest.param(p, marks=[] if p in ALWAYS else [pytest.mark.long]) for p in FIRST_SLOTS],
)
def test_everybody_sits_on_the_plans_slots_and_the_numbers_are_the_same(
    preset: str,
    cluster: FakeCluster,
    models: tuple[str, str],
    numbers: dict[str, list[dict[str, float]]],
    tmp_path: Path,
) -> None:
    rollout: dict[str, Any] = {"weight_sync": {"backend": ROUTES.get(preset, "auto")}}
    if preset in SHARED:
        rollout["sleep"] = True  # what auto is on GPUs
    config = preset_run(tmp_path / "run", models, preset, rollout=rollout)
    done = run_on(cluster, config)
    assert done.returncode == 0, done.stdout + done.stderr
    placement = json.loads((Path(config.run.path) / "placement.json").read_text())
    place_of = [(slot["node"], slot["gpu"]) for slot in placement["slots"]]
    assert len(set(place_of)) == len(place_of), "no GPU is two slots"
    first = FIRST_SLOTS[preset]
    wanted = {
        (role, unit): place_of[start + unit]
        for role, start in first.items()
        for unit in range(1 if role == "ref" else 2)
    }
    locations = {
        (worker["role"], worker["unit"]): (worker["node"], worker["gpu"]) for worker in placement["workers"]
    }
    assert locations == wanted

    if preset in SHARED:
        check_turns(Path(config.run.path) / "turns.jsonl")
    numbers[preset] = metrics_of(config)
    assert [row["rollout/weight_sync_fallbacks"] for row in numbers[preset]] == [0, 0]
    for ours, theirs in zip(numbers[preset], next(iter(numbers.values())), strict=True):
        for key in ("loss/actor", "loss/critic", "kl/mean", "reward/mean", "loss/entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
