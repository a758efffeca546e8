"""Metrics of a step's rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rayrlhf.samples import Sample
from rayrlhf.train.collectives import Ranks


def rollout_metrics(
    sampled: Sequence[Sample],
    trained: Sequence[Sample],
    seconds: dict[str, float],
    ranks: Ranks,
    *,
    step: int,
    retries: int,
) -> dict[str, float]:
    """Rewards, lengths, staleness and rates of the step's samples, over all ranks. Collective.

    `trained` are those of `sampled` that were trained on, on the ranks that sampled them.
    """
    scores = np.array([sample.score for sample in sampled if sample.score is not None], dtype=np.float64)
    ages = [step - version for sample in trained for version in sample.policy_versions]
    totals = ranks.sum_numbers(
        {
            "scored": float(len(scores)),
            "samples": float(len(sampled)),
            "score": float(scores.sum()),
            "score_squared": float((scores**2).sum()),
            "response_tokens": float(sum(len(sample.response_ids) for sample in sampled)),
            "truncated": float(sum(sample.truncated for sample in sampled)),
            "turns": float(sum(sample.num_turns for sample in sampled)),
            "failed_episodes": float(sum(bool(sample.failure) for sample in sampled)),
            "retries": float(retries),
            "ages": float(sum(ages)),
            "aged_tokens": float(len(ages)),
        }
    )
    num_scored, num_samples = max(totals["scored"], 1.0), max(totals["samples"], 1.0)
    mean = totals["score"] / num_scored
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(max(0.0, totals["score_squared"] / num_scored - mean**2)),
        "rollout/samples": totals["samples"],
        "rollout/response_tokens_mean": totals["response_tokens"] / num_samples,
        "rollout/truncated_fraction": totals["truncated"] / num_samples,
        "rollout/tokens_per_second": totals["response_tokens"] / max(seconds["time/rollout"], 1e-9),
        "rollout/turns_mean": totals["turns"] / num_samples,
        "rollout/failed_episodes": totals["failed_episodes"],
        "rollout/staleness_mean": totals["ages"] / max(totals["aged_tokens"], 1.0),
        "rollout/staleness_max": ranks.max(max(ages, default=0)),
        "rollout/retries": totals["retries"],
    }
