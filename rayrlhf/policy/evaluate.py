"""Evaluation on held-out prompts: sampling, scoring, and metrics over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrlhf.config.policy import PolicyRunConfig
from rayrlhf.observe.statistics import bootstrap_interval, pass_at_k
from rayrlhf.policy.rollouts import Collector, Rewards
from rayrlhf.samples import Prompt, Sample
from rayrlhf.train.collectives import Ranks

# Evaluation has separate group ids, and thereby seeds, the same at every evaluation: differences come from
# the policy alone.
FIRST_GROUP_ID = 2**40


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    rows: list[dict[str, Any]]  # one per response, in the order of the data: prompt, response, reward


def eval_plan(num_prompts: int, world_size: int) -> np.ndarray:
    """Row ids [1, world_size, per_rank] that cover every prompt; the last ranks repeat some to fill up."""
    per_rank = -(-num_prompts // world_size)
    return np.resize(np.arange(num_prompts), (1, world_size, per_rank))


def evaluate(
    prompts: Sequence[Prompt],
    collector: Collector,
    rewards: Rewards,
    config: PolicyRunConfig,
    ranks: Ranks,
    *,
    num_prompts: int,
    version: int,
) -> Evaluation:
    """`eval.samples_per_prompt` responses per held-out prompt. Collective: every rank passes its share."""
    first = FIRST_GROUP_ID + ranks.rank * len(prompts)
    samples = collector.collect(
        list(enumerate(prompts, start=first)),
        version=version,
        group_size=config.eval.samples_per_prompt,
        sampling=config.eval_sampling,
    )
    samples = rewards.combiner.combine(samples, ranks.sum_tensor, normalize=False)
    gathered = ranks.gather(samples)
    unique = [s for s in gathered if s.group_id < FIRST_GROUP_ID + num_prompts]  # without the repeated ones
    scored = [sample for sample in unique if sample.score is not None]
    rewards.client.check(len(unique) - len(scored), len(unique))
    means = _mean_per_prompt(scored)
    low, high = bootstrap_interval(means)
    return Evaluation(
        metrics={
            "eval/reward_mean": float(np.mean(means)),
            "eval/reward_ci_low": low,
            "eval/reward_ci_high": high,
            "eval/response_tokens_mean": float(np.mean([len(sample.response_ids) for sample in scored])),
            **pass_rates(
                [(sample.group_id, rewards.combiner.raw_reward(sample)) for sample in scored],
                config.eval.samples_per_prompt,
                config.eval.pass_score,
            ),
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


def _mean_per_prompt(scored: Sequence[Sample]) -> list[float]:
    """Mean score of each prompt. The bootstrap resamples prompts, because responses to one are not
    independent.
    """
    scores: dict[int, list[float]] = {}
    for sample in scored:
        assert sample.score is not None
        scores.setdefault(sample.group_id, []).append(sample.score)
    return [float(np.mean(group)) for group in scores.values()]


def pass_rates(rewards: Sequence[tuple[int, float]], group_size: int, pass_score: float) -> dict[str, float]:
    """`eval/pass_at_<k>` for k = 1, 2, 4, … up to `group_size`; nothing for single responses.

    `rewards` are (group id of the prompt, raw reward), so that a correct answer passes whatever its length. A
    prompt that lost samples to failed rewards counts with the remaining ones, if there are at least k.
    """
    if group_size < 2:
        return {}
    sizes = Counter(group_id for group_id, _ in rewards)
    passed = Counter(group_id for group_id, reward in rewards if reward >= pass_score)
    rates: dict[str, float] = {}
    for k in (2**i for i in range(group_size.bit_length())):
        estimates = [pass_at_k(size, passed[group_id], k) for group_id, size in sizes.items() if size >= k]
        if k <= group_size and estimates:
            rates[f"eval/pass_at_{k}"] = float(np.mean(estimates))
    return rates
