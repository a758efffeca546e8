"""The critic's loss, and explained variance of the returns."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import masked
from rayrlhf.algorithms.metrics import ExplainedVariance, Metrics, token_mean


def value_loss(
    values: Tensor,  # [T] with gradient
    old_values: Tensor,  # [T] the critic before this step's updates
    returns: Tensor,  # [T]
    loss_mask: Tensor,  # [T]
    *,
    clip: float | None,
) -> tuple[Tensor, Metrics]:
    """½·max((V - R)², (clip(V, V_old ± c) - R)²), [T] in fp32; `clip=None` is ½(V - R)² (arXiv 1707.06347).

    Returns `(per_token_loss, metrics)`: unaggregated, 0 outside the mask. A token counts as clipped when
    the clipped term decides it, i.e. its gradient is 0.
    """
    values, returns = masked(values, loss_mask), masked(returns, loss_mask)
    error = (values - returns).square()
    clipped = torch.zeros_like(error, dtype=torch.bool)
    if clip is not None:
        old_values = masked(old_values, loss_mask)
        moved = (values.detach() - old_values).abs() > clip
        clipped_error = (torch.clamp(values, old_values - clip, old_values + clip) - returns).square()
        # Inside the range both terms are the same: the bound applies only to values outside of it.
        clipped = moved & (clipped_error > error)
        error = torch.where(clipped, clipped_error, error)
    metrics = Metrics(
        {
            "loss/value_clip_fraction": token_mean(clipped, loss_mask),
            "loss/value": token_mean(values, loss_mask),
            "loss/return": token_mean(returns, loss_mask),
        }
    )
    return masked(0.5 * error, loss_mask), metrics


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, loss_mask: Tensor) -> ExplainedVariance:
    """How much of the variance of `returns` [T] the `values` [T] explain, over loss tokens, in float64."""
    target = masked(returns, loss_mask).double()
    residual = target - masked(values, loss_mask).double()
    count = (loss_mask > 0).sum().double()
    sums = [count, target.sum(), target.square().sum(), residual.sum(), residual.square().sum()]
    return ExplainedVariance(tuple(torch.stack(sums).tolist()))
