"""The critic's loss, and how much of the returns' variance it explains."""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import masked

# Returns whose variance is this small beside their mean square differ by rounding only.
CONSTANT_RETURNS = 1e-12


def value_loss(
    values: Tensor,  # [T] with gradient
    old_values: Tensor,  # [T] the critic before this step's updates
    returns: Tensor,  # [T]
    loss_mask: Tensor,  # [T]
    *,
    clip: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """½·max((V - R)², (clip(V, V_old ± c) - R)²), [T] in fp32; `clip=None` is ½(V - R)² (arXiv 1707.06347).

    Returns `(per_token_loss, metrics)`: unaggregated, 0 outside the mask. Metrics are sums over masked
    tokens. A token counts as clipped when the clipped term decides it, i.e. its gradient is 0.
    """
    values, returns = masked(values, loss_mask), masked(returns, loss_mask)
    error = (values - returns).square()
    clipped = torch.zeros_like(error, dtype=torch.bool)
    if clip is not None:
        old_values = masked(old_values, loss_mask)
        moved = (values.detach() - old_values).abs() > clip
        clipped_error = (torch.clamp(values, old_values - clip, old_values + clip) - returns).square()
        # Inside the range both terms are the same: only a value that has left it can be decided by the bound.
        clipped = moved & (clipped_error > error)
        error = torch.where(clipped, clipped_error, error)
    metrics = {
        "loss/value_clip_fraction": clipped.float().sum(),
        "loss/value": values.detach().sum(),
        "loss/return": returns.detach().sum(),
    }
    return masked(0.5 * error, loss_mask), metrics


@torch.no_grad()
def explained_variance_sums(values: Tensor, returns: Tensor, loss_mask: Tensor) -> Tensor:
    """Sums [5] in float64 (count, Σ R, Σ R², Σ (R-V), Σ (R-V)²) over masked tokens; sums of parts add up."""
    target = masked(returns, loss_mask).double()
    residual = target - masked(values, loss_mask).double()
    count = (loss_mask > 0).sum().double()
    return torch.stack([count, target.sum(), target.square().sum(), residual.sum(), residual.square().sum()])


def explained_variance(sums: Tensor) -> float:
    """1 - Var(R - V)/Var(R) from global `sums` [5]: 1 is a perfect critic, 0 no better than a constant.

    NaN where it is undefined: no token, or returns without variance.
    """
    count, total, total_squares, residual, residual_squares = sums.tolist()
    if count == 0:
        return float("nan")
    variance = total_squares / count - (total / count) ** 2
    if variance <= CONSTANT_RETURNS * total_squares / count:
        return float("nan")
    return 1.0 - (residual_squares / count - (residual / count) ** 2) / variance
