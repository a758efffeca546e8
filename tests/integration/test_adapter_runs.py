"""Adapters alone are pushed to engines in the middle of multi-turn responses, with everything real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftConfig

from jobs.environments.calculator import write_rows
from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("ray_session")]

NUM_STEPS = 6
NUM_TURNS = 3
TURN_TOKENS = 96  # long enough for an update and a push before the last token


class Listener:
    """An environment of three turns, whatever the policy says; a share of vowels is the reward."""

    def __init__(self) -> None:
        self.num_turns = 0

    def reset(self, row: dict[str, str]) -> str:
        return row["prompt"]

    def step(self, response: str) -> tuple[dict[str, str], float, bool]:
        self.num_turns += 1
        vowels = sum(c in "aeiou" for c in response) / max(1, len(response))
        return {"role": "tool", "content": "go on"}, vowels, self.num_turns == NUM_TURNS


def test_adapters_are_pushed_in_the_middle_of_responses(tmp_path: Path, tiny_model: str) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say {i}"} for i in range(32)])
    environment = {
        "environment": "tests.integration.test_adapter_runs:Listener",
        "max_turns": NUM_TURNS,
        "max_response_tokens": 384,
    }
    config = tiny_run(
        tmp_path,
        tiny_model,
        model={"lora": {"rank": 8, "alpha": 16}},
        data={"train": str(tmp_path / "rows.jsonl")},
        critic=None,
        algorithm={"advantage": "grpo", "kl_coef": 0.0},
        rollout={
            "group_size": 4,
            "prompts_per_step": 4,
            "max_staleness": 1,
            "sampling": {"max_new_tokens": TURN_TOKENS},
            "environment": environment,
            "weight_sync": {"lora": "adapter"},
        },
        reward={"sources": [{"type": "environment"}]},
        train={"num_steps": NUM_STEPS, "max_failures": 0},
        observe={"rollouts_per_step": 100},
    )
    assert run_policy(config) == 0
    run = tmp_path / "runs/tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/mean" in line]
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(steps) == NUM_STEPS and len(rows) == NUM_STEPS * 16
    mixed = [row for row in rows if row["newest_policy_version"] > row["policy_version"]]
    print(f"{len(mixed)} of {len(rows)} samples have tokens of two versions")
    print("logprob_diff_mean", [step["rollout/logprob_diff_mean"] for step in steps])
    print("staleness", [(step["rollout/staleness_mean"], step["rollout/staleness_max"]) for step in steps])
    assert mixed, "a push reached the engine while it generated"
    assert max(row["turns"] for row in mixed) > 1
    assert max(step["rollout/staleness_max"] for step in steps) == 1
    assert not any(step["rollout/failed_episodes"] or step["reward/failed"] for step in steps)
    # From the start the engines hold what is trained: only tokens of the version before differ, by an update.
    for step in steps:
        assert step["rollout/logprob_diff_mean"] < 1e-3 + 0.1 * step["rollout/staleness_mean"]
    PeftConfig.from_pretrained(str(run / "export/adapter"))
