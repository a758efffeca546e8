"""From what each optimizer step measured to the metrics of the training step: all passes and mini-batches.

A mean is over what it is a mean of: tokens, sequences or optimizer steps of the whole training step. The mean
of mini-batches' means is another number where these differ in size, and the last mini-batch's is noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rayrlhf.algorithms.value_loss import explained_variance
from rayrlhf.policy.losses import StepCounts


@dataclass(frozen=True)
class UpdateMetrics:
    """What one optimizer step measured, or several together, over all ranks; adds up with `+`."""

    totals: dict[str, float] = field(default_factory=dict)  # of means: Σ over their weights
    weights: dict[str, float] = field(default_factory=dict)  # of the same keys
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    returns: tuple[float, ...] = ()  # `explained_variance_sums`; empty without a critic

    def __add__(self, other: UpdateMetrics) -> UpdateMetrics:
        return UpdateMetrics(
            totals=_added(self.totals, other.totals),
            weights=_added(self.weights, other.weights),
            sums=_added(self.sums, other.sums),
            maxima={
                key: max(part[key] for part in (self.maxima, other.maxima) if key in part)
                for key in self.maxima | other.maxima
            },
            returns=tuple(map(sum, zip(self.returns, other.returns, strict=True)))
            if self.returns and other.returns
            else self.returns or other.returns,
        )

    def result(self) -> dict[str, float]:
        """The metrics; a mean over nothing is left out."""
        means = {key: self.totals[key] / weight for key, weight in self.weights.items() if weight}
        metrics = means | self.sums | self.maxima
        if self.returns:
            returns = torch.tensor(self.returns, dtype=torch.float64)
            metrics["loss/explained_variance"] = explained_variance(returns)
        return metrics


def update_metrics(
    measured: Mapping[str, float],
    counts: StepCounts,
    *,
    name: str,
    aggregation: str,
    returns: tuple[float, ...] = (),
) -> UpdateMetrics:
    """Of one optimizer step of the learner `name`, whose `update` has returned `measured`.

    What the objective is averaged over (`aggregation`) weighs the objective. The gradient norm is averaged
    over the steps that have a finite one; the others are counted in `_bad_steps`. Texts of PPO-ptx are the
    same in every optimizer step, so each weighs the same. Everything else is a sum over trained tokens, or
    with a key in `_max` an extreme.
    """
    objective = f"loss/{name}"
    over = counts.tokens if aggregation == "token_mean" else counts.sequences
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for key, value in measured.items():
        if key == f"{objective}_bad_steps":
            sums[key] = value
        elif key.endswith("_max"):
            maxima[key] = value
        elif key == objective:
            totals[key], weights[key] = value * over, over
        elif key == f"{objective}_grad_norm":
            is_finite = math.isfinite(value)
            totals[key], weights[key] = (value, 1.0) if is_finite else (0.0, 0.0)
        elif key in (f"{objective}_lr", "loss/ptx"):
            totals[key], weights[key] = value, 1.0
        else:
            totals[key], weights[key] = value, counts.tokens
    return UpdateMetrics(totals, weights, sums, maxima, returns)


def _added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {key: first.get(key, 0.0) + second.get(key, 0.0) for key in {**first, **second}}
