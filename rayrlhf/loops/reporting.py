"""What a worker tells: phases, steps and evaluations to the board (rank 0 alone), metrics reduced over
ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from rayrlhf.observe.board import Report
from rayrlhf.observe.metrics import check_keys
from rayrlhf.placement.lease import NAMESPACE
from rayrlhf.samples import Sample
from rayrlhf.train import collectives


class Reporter:
    """Posts and does not wait: a slow console must not hold up training."""

    def __init__(self, board: str, rank: int) -> None:
        self.board = ray.get_actor(board, namespace=NAMESPACE) if rank == 0 else None

    def say(self, step: int, text: str) -> None:
        self._post(Report("phase", step, text))

    def event(self, step: int, text: str) -> None:
        self._post(Report("event", step, text))

    def warn(self, step: int, text: str) -> None:
        self._post(Report("warning", step, text))

    def evaluation(self, step: int, when: str, metrics: dict[str, float], rows: list[dict[str, Any]]) -> None:
        self._post(Report("eval", step, when, metrics, rows))

    def step(self, step: int, metrics: dict[str, float], shown: Sequence[Sample]) -> None:
        check_keys(metrics)
        self._post(Report("step", step, metrics=metrics))
        self._post(Report("rollouts", step, rows=[_row(step, sample) for sample in shown]))

    def _post(self, report: Report) -> None:
        if self.board is not None:
            self.board.post.remote(report)


def _row(step: int, sample: Sample) -> dict[str, Any]:
    return {
        "step": step,
        "group": sample.group_id,
        "row_id": sample.prompt.row_id,
        "prompt": sample.prompt.prompt,
        "response": sample.response,
        "reward": sample.score,
        "policy_version": sample.policy_version,
        "truncated": sample.truncated,
        "turns": sample.num_turns,
        "failure": sample.failure,
    }


def rollout_metrics(
    sampled: Sequence[Sample],
    trained: Sequence[Sample],
    seconds: dict[str, float],
    *,
    step: int,
    retries: int,
) -> dict[str, float]:
    """Rewards, lengths, ages and rates of the step's samples, over all ranks. Collective.

    `trained` are those of `sampled` that were learnt from, on the ranks that sampled them.
    """
    scores = np.array([sample.score for sample in sampled if sample.score is not None], dtype=np.float64)
    ages = [step - version for sample in trained for version in sample.policy_versions]
    totals = collectives.sum_metrics(
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
        "rollout/staleness_max": collectives.max_over_ranks(max(ages, default=0)),
        "rollout/retries": totals["retries"],
    }
