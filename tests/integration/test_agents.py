"""Both example environments are solved by GRPO: from under 0.3 to over 0.8 of the best possible reward.

Everything is real: Data, Train + DeepSpeed, Serve with vLLM and the replicas of the environments. The models
are made on the spot; they know the form of their task, but mostly guess.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.environments.calculator import write_rows
from jobs.environments.guess_number import best_mean_reward
from rayrlhf.policy.driver import run_policy
from tests.integration.policy_runs import tiny_run
from tests.jobs.environments.players import (
    CALCULATOR,
    GUESS_NUMBER,
    GUESSES,
    HIGHEST,
    calculator_model,
    guessing_model,
    hidden_numbers,
    sums,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("ray_session")]

CALCULATOR_STEPS = 20
GUESSING_STEPS = 40
SEEDS = (0, 1, 2)


def learn(
    folder: Path,
    model: str,
    environment: dict[str, Any],
    *,
    prompts: int,
    lr: float,
    mini_batches: int,
    steps: int,
    seed: int,
) -> list[dict[str, float]]:
    """The metrics of every step of a run in `folder`, whose train.jsonl has the rows."""
    config = tiny_run(
        folder,
        model,
        run={"seed": seed},
        data={"train": str(folder / "rows.jsonl"), "max_prompt_tokens": 16},
        critic=None,
        algorithm={"advantage": "grpo", "kl_coef": 0.0, "mini_batches": mini_batches},
        rollout={
            "group_size": 16,
            "prompts_per_step": prompts,
            "sampling": {"max_new_tokens": 20},
            "environment": {"timeout_seconds": 60, **environment},
        },
        reward={"sources": [{"type": "environment"}]},
        train={"num_steps": steps, "lr": lr, "max_tokens_per_micro_batch": 4096},
    )
    assert run_policy(config) == 0
    lines = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def check(metrics: list[dict[str, float]], *, steps: int, best: float) -> None:
    rewards = [line["reward/mean"] for line in metrics]
    print(" ".join(f"{reward:.3f}" for reward in rewards))
    assert len(rewards) == steps
    assert rewards[0] < 0.3 * best, "the first step is sampled before any training"
    assert sum(rewards[-3:]) / 3 > 0.8 * best
    check_episodes(metrics)


def check_episodes(metrics: list[dict[str, float]]) -> None:
    assert all(line["reward/failed"] == 0 for line in metrics)
    # The trainer reads the very tokens that the engine has sampled and the environment has added.
    assert max(line["rollout/logprob_diff_mean"] for line in metrics) < 1e-3


def learn_the_calculator(folder: Path, *, prompts: int, steps: int, seed: int) -> list[dict[str, float]]:
    model = calculator_model(folder / "model", seed=seed)
    write_rows(folder / "rows.jsonl", sums(1000, seed=seed))
    environment = {
        "environment": "jobs.environments.calculator:Calculator",
        "arguments": CALCULATOR,
        "max_turns": 3,
        "max_response_tokens": 64,
    }
    return learn(folder, model, environment, prompts=prompts, lr=3e-4, mini_batches=1, steps=steps, seed=seed)


def test_what_is_trained_on_is_what_was_sampled(tmp_path: Path) -> None:
    metrics = learn_the_calculator(tmp_path, prompts=8, steps=3, seed=0)
    assert len(metrics) == 3
    check_episodes(metrics)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_calculator_is_used(seed: int, tmp_path: Path) -> None:
    metrics = learn_the_calculator(tmp_path, prompts=16, steps=CALCULATOR_STEPS, seed=seed)
    check(metrics, steps=CALCULATOR_STEPS, best=1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_found_by_halving(seed: int, tmp_path: Path) -> None:
    model = guessing_model(tmp_path / "model", seed=seed)
    rows = hidden_numbers()
    write_rows(tmp_path / "rows.jsonl", rows)
    metrics = learn(
        tmp_path,
        model,
        {
            "environment": "jobs/environments/guess_number.py:GuessNumber",
            "arguments": GUESS_NUMBER,
            "max_turns": GUESSES,
            "max_response_tokens": 40,
        },
        prompts=len(rows),  # every number twice in every step
        lr=5e-4,
        mini_batches=2,
        steps=GUESSING_STEPS,
        seed=seed,
    )
    check(metrics, steps=GUESSING_STEPS, best=best_mean_reward(HIGHEST, max_turns=GUESSES))
