"""Rollouts that run ahead of training, with everything real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def rollouts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/tiny/rollouts.jsonl").read_text().splitlines()]


def grpo(folder: Path, model: str, num_steps: int, **rollout: Any) -> int:
    folder.mkdir()
    return run_policy(
        tiny_run(
            folder,
            model,
            critic=None,
            algorithm={"advantage": "grpo", "kl_coef": 0.0},
            rollout={"group_size": 4, "prompts_per_step": 4, **rollout},
            train={"num_steps": num_steps, "max_failures": 0},
            observe={"rollouts_per_step": 100},
        )
    )


@pytest.mark.long
def test_without_staleness_it_is_the_synchronous_run(tmp_path: Path, tiny_model: str) -> None:
    assert grpo(tmp_path / "sync", tiny_model, 4) == 0
    assert grpo(tmp_path / "async", tiny_model, 4, max_staleness=0) == 0
    sync, asynchronous = rollouts_of(tmp_path / "sync"), rollouts_of(tmp_path / "async")
    assert len(sync) == 4 * 16
    assert asynchronous == sync, "the same samples by the same weights with the same rewards"
    for ours, theirs in zip(steps_of(tmp_path / "async"), steps_of(tmp_path / "sync"), strict=True):
        timing = ("time/", "rollout/tokens_per_second", "train/tokens_per_second", "rollout/restarted")
        same = {key: value for key, value in ours.items() if not key.startswith(timing)}
        assert same == {key: theirs[key] for key in same}


def test_rollouts_run_ahead_by_one_version_and_no_more(tmp_path: Path, tiny_model: str) -> None:
    assert grpo(tmp_path / "one", tiny_model, 6, max_staleness=1) == 0
    steps = steps_of(tmp_path / "one")
    assert [step["rollout/staleness_max"] for step in steps] == [0, 1, 1, 1, 1, 1]
    assert [step["rollout/restarted_groups"] for step in steps] == [0] * 6
    rows = rollouts_of(tmp_path / "one")
    groups = [{row["group"] for row in rows if row["step"] == step} for step in range(1, 7)]
    assert groups == [set(range(4 * s, 4 * s + 4)) for s in range(6)], "every prompt once, in order"


@pytest.mark.long
def test_oversampling_loses_no_prompt(tmp_path: Path, tiny_model: str) -> None:
    assert grpo(tmp_path / "over", tiny_model, 6, max_staleness=1, oversampling=1.5) == 0
    assert max(step["rollout/staleness_max"] for step in steps_of(tmp_path / "over")) <= 1
    rows = rollouts_of(tmp_path / "over")
    trained = [row["group"] for row in rows]
    assert sorted(trained) == sorted(list(set(trained)) * 4), "each group is trained on once, as a whole"
    assert len(set(trained)) == 24
