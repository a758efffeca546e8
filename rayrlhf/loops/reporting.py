"""What a worker tells: phases, steps and evaluations to the board (rank 0 alone), metrics reduced over
ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from rayrlhf.batch import Sample
from rayrlhf.observe.board import Report
from rayrlhf.observe.metrics import check_keys
from rayrlhf.placement.lease import NAMESPACE
from rayrlhf.train import collectives


class Reporter:
    """Posts and does not wait: a slow console must not hold up training."""

    def __init__(self, board: str, rank: int) -> None:
        self.board = ray.get_actor(board, namespace=NAMESPACE) if rank == 0 else None

    def say(self, step: int, text: str) -> None:
        self._post(Report("phase", step, text))

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
    }


def rollout_metrics(
    samples: Sequence[Sample], kept: Sequence[Sample], seconds: dict[str, float], *, retries: int
) -> dict[str, float]:
    """Rewards, lengths and rates of the step's samples, over all ranks. Collective."""
    scores = np.array([sample.score for sample in kept], dtype=np.float64)
    totals = collectives.sum_metrics(
        {
            "kept": float(len(kept)),
            "samples": float(len(samples)),
            "score": float(scores.sum()),
            "score_squared": float((scores**2).sum()),
            "response_tokens": float(sum(len(sample.response_ids) for sample in samples)),
            "trained_tokens": float(sum(sample.num_tokens for sample in kept)),
            "truncated": float(sum(sample.truncated for sample in samples)),
            "retries": float(retries),
        }
    )
    num_kept, num_samples = max(totals["kept"], 1.0), max(totals["samples"], 1.0)
    mean = totals["score"] / num_kept
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(max(0.0, totals["score_squared"] / num_kept - mean**2)),
        "rollout/response_tokens_mean": totals["response_tokens"] / num_samples,
        "rollout/truncated_fraction": totals["truncated"] / num_samples,
        "rollout/tokens_per_second": totals["response_tokens"] / max(seconds["time/rollout"], 1e-9),
        "rollout/retries": totals["retries"],
        "data/samples": totals["kept"],
        "data/tokens": totals["trained_tokens"],
    }
