"""Policy runs of mixtures of experts through vLLM: balance loss, router replay, pushes of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run
from tests.tiny_families import make_family

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

GRPO: dict[str, Any] = {
    "critic": None,
    "algorithm": {"advantage": "grpo", "kl_coef": 0.0},
    "rollout": {"group_size": 4, "prompts_per_step": 8, "router_replay": True},
}
PPO: dict[str, Any] = {
    "algorithm": {"kl_coef": 0.001},
    "rollout": {"prompts_per_step": 16, "router_replay": True},
}


def steps_of(folder: Path, family: str, **changes: Any) -> list[dict[str, float]]:
    """Metrics of three steps with the balance loss."""
    model = {"path": make_family(folder / family, family), "aux_loss_coef": 0.01}
    config = tiny_run(folder, model["path"], **{**changes, "model": model})
    assert run_policy(config) == 0
    lines = (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check(steps: list[dict[str, float]], roles: tuple[str, ...]) -> None:
    assert len(steps) == 3
    for step in steps:
        assert step["rollout/logprob_diff_max"] < 1e-4
        for role in roles:
            assert 2.0 <= step[f"loss/{role}_balance"] < 4.0, (
                "experts per token if balanced, up to their number"
            )
            assert 1.0 <= step[f"experts/{role}_load_max"] <= 2.0, "of 4 experts, 2 per token"


def test_grpo_with_router_replay_on_two_workers(tmp_path: Path) -> None:
    train = {"num_steps": 3, "lr": 1e-3, "zero_stage": 3, "num_workers": 2, "gradient_checkpointing": True}
    check(steps_of(tmp_path, "mixtral", train=train, **GRPO), ("actor",))


@pytest.mark.long
def test_ppo_with_router_replay(tmp_path: Path) -> None:
    train = {"num_steps": 3, "lr": 1e-3, "zero_stage": 2}
    check(steps_of(tmp_path, "qwen3_moe", train=train, **PPO), ("actor", "critic"))
