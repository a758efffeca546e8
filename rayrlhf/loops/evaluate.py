"""Held-out prompts: sampled, scored, and gathered from all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrlhf.batch import Prompt, Sample
from rayrlhf.config.run import PolicyRunConfig
from rayrlhf.loops.experience import collect
from rayrlhf.observe.statistics import bootstrap_interval
from rayrlhf.reward.score import RewardClient
from rayrlhf.rollout.client import RolloutClient
from rayrlhf.train import collectives

# Evaluation draws from seeds of its own, the same at every evaluation: differences come from the policy
# alone.
EVAL_STEP = 2**31


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    rows: list[dict[str, Any]]  # one per prompt, in the order of the data: prompt, response, reward


def eval_plan(num_prompts: int, world_size: int) -> np.ndarray:
    """Row ids [1, world_size, per_rank] that cover every prompt; the last ranks repeat some to come out
    even.
    """
    per_rank = -(-num_prompts // world_size)
    return np.resize(np.arange(num_prompts), (1, world_size, per_rank))


def evaluate(
    prompts: Sequence[Prompt],
    rollouts: RolloutClient,
    rewards: RewardClient,
    config: PolicyRunConfig,
    *,
    num_prompts: int,
    version: int,
) -> Evaluation:
    """Score one response per held-out prompt. Collective: every rank brings its share of the prompts."""
    first = collectives.rank() * len(prompts)
    samples = collect(
        prompts,
        rollouts,
        rewards,
        step=EVAL_STEP,
        version=version,
        group_size=1,
        sampling=config.eval.sampling,
        first_group_id=first,
    )
    everyone: list[Sample] = [s for s in collectives.gather_lists(samples) if s.group_id < num_prompts]
    scored = [sample for sample in everyone if sample.score is not None]
    rewards.check(len(everyone) - len(scored), len(everyone))
    scores = [float(sample.score or 0.0) for sample in scored]
    low, high = bootstrap_interval(scores)
    return Evaluation(
        metrics={
            "eval/reward_mean": float(np.mean(scores)),
            "eval/reward_ci_low": low,
            "eval/reward_ci_high": high,
            "eval/response_tokens_mean": float(np.mean([len(sample.response_ids) for sample in scored])),
        },
        rows=[
            {
                "prompt": sample.prompt.columns.get(config.data.prompt_key, sample.prompt.prompt),
                "response": sample.response,
                "reward": sample.score,
            }
            for sample in scored
        ],
    )
