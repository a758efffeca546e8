"""Evaluation metrics on held-out samples: means, confidence intervals and calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrlhf.observe.statistics import bootstrap_interval, calibration_error

MARGIN = "reward/margin"
# The rewards of rejected and undesirable responses are to fall.
LOWER_IS_BETTER = frozenset(
    {
        "loss",
        "calibration_error",
        "nll",
        "divergence",
        "entropy",
        "mismatched",
        "rejected",
        "undesirable",
    }
)


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    rows: list[dict[str, Any]]  # one per sample, in the order of the data


def evaluation_of(per_rank: Sequence[dict[str, Any]]) -> Evaluation:
    """Combine the results of `Task.evaluate` of all ranks: [total, weight] of every metric for every sample.

    `eval/<name>` is Σ total / Σ weight; a metric that no sample has is left out. For the loss, a bootstrap
    interval over samples is added; for reward margins, the calibration error of σ(margin) as the probability
    that the preferred response is the better one.
    """
    row_ids = np.array([row for part in per_rank for row in part["row_ids"]], dtype=np.int64)
    order = np.argsort(row_ids, kind="stable")
    keys = [key for key in per_rank[0] if key != "row_ids"]
    values = {key: np.array([pair for part in per_rank for pair in part[key]])[order] for key in keys}
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = [{"row_id": int(row)} for row in row_ids[order]]
    for key, pairs in values.items():
        name = key.rpartition("/")[2]
        total, weight = pairs.sum(0)
        if weight:
            metrics[f"eval/{name}"] = float(total / weight)
        for row, (part, own_weight) in zip(rows, pairs, strict=True):
            if own_weight:
                row[name] = float(part / own_weight)
    losses, weights = values["eval/loss"].T
    weighs = weights > 0
    low, high = bootstrap_interval(losses[weighs] / weights[weighs], weights[weighs])
    metrics |= {"eval/loss_ci_low": low, "eval/loss_ci_high": high, "eval/samples": float(len(rows))}
    if MARGIN in values:
        metrics["eval/calibration_error"] = calibration_error(values[MARGIN][:, 0])
    return Evaluation(metrics, rows)


def is_better(metric: str, value: float, best: float) -> bool:
    """Whether `value` of an `eval.metric` is better than the best so far."""
    return value < best if metric in LOWER_IS_BETTER else value > best
