"""Importance weights that correct for differences between the rollout engine's and the trainer's
probabilities.

An engine samples with other kernels, another precision or older weights than the trainer computes gradients
with. The expectation over its samples becomes the trainer's once each token's loss is multiplied by
w = exp(old_logprobs - rollout_logprobs), the trainer's policy before this step's updates against the engine's
record (importance sampling). Since w has a heavy tail, it is bounded (`registry.ROLLOUT_CORRECTIONS`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import masked, sequence_counts, sequence_sums
from rayrlhf.algorithms.metrics import Max, Metrics, token_mean
from rayrlhf.algorithms.registry import ROLLOUT_CORRECTIONS, WEIGHT_LEVELS
from rayrlhf.batch import sequence_ids_of

MAX_LOG_WEIGHT = 20.0


def truncate(weights: Tensor, low: float, high: float) -> Tensor:
    """min(w, high), [T]: truncated importance sampling, "TIS".

    Ionides 2008; for RL of language models Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training". Raises `ValueError` for `low` other than 0: nothing is done at the lower end.
    """
    if low != 0:
        raise ValueError(
            f"rollout correction: low={low} has no effect with mode=truncate, which only bounds from above: "
            "leave it at 0, or use mode=mask"
        )
    return weights.clamp(max=high)


def mask_outside(weights: Tensor, low: float, high: float) -> Tensor:
    """w where low ≤ w ≤ high, else 0, [T]: a token outside has no gradient, one inside keeps its weight.

    IcePop (Ling team 2025, arXiv 2510.18855) per token. A weight that is NaN counts as outside.
    """
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


def token_log_weights(log_ratios: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each token's own log-ratio, [T]: less variance than the sequence's, but biased by what came before."""
    return log_ratios


def sequence_log_weights(log_ratios: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The log-ratio of the whole sequence, Σ over its masked tokens, on each of its tokens, [T]: unbiased."""
    return sequence_sums(log_ratios, loss_mask, cu_seqlens)[sequence_ids_of(cu_seqlens)]


def geometric_log_weights(log_ratios: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean log-ratio over the sequence's masked tokens, on each of its tokens, [T].

    Its exponential is the geometric mean of the tokens' weights, which does not grow with the length: with
    `mask`, whole sequences are left out by how far engine and trainer differ per token.
    """
    counts = sequence_counts(loss_mask, cu_seqlens).clamp_min(1.0)
    return (sequence_sums(log_ratios, loss_mask, cu_seqlens) / counts)[sequence_ids_of(cu_seqlens)]


@torch.no_grad()
def rollout_weights(
    old_logprobs: Tensor,  # [T] the trainer's, before this step's updates
    rollout_logprobs: Tensor,  # [T] the engine's, from when it sampled
    loss_mask: Tensor,  # [T]
    cu_seqlens: Tensor,  # [S+1]
    *,
    mode: str | None,
    level: str,
    low: float,
    high: float,
) -> tuple[Tensor, Metrics]:
    """The weight of every token's loss, [T] in fp32, constant to autograd and 0 outside the mask; metrics.

    w = exp(old - rollout) of the token, or exp(Σ (old - rollout)) of its sequence, as `level` in
    `WEIGHT_LEVELS` says; the log-ratio, after the sum, is clamped at ±20. `mode` in `ROLLOUT_CORRECTIONS`
    bounds w by `low` and `high`; `mode=None` corrects nothing (weight 1, bounds unread) but still measures.

    `loss/is_weight_*` are of w before it is bounded; `loss/is_masked_fraction` is the share of tokens that
    the bound changed (clipped or zeroed).

    Raises `ValueError` for an unknown name, or unless 0 ≤ low ≤ 1 ≤ high: an engine that agrees exactly has
    w = 1 and must be left alone.
    """
    if level not in WEIGHT_LEVELS:
        raise ValueError(f"rollout correction: level={level!r} is not one of {', '.join(WEIGHT_LEVELS)}")
    log_ratios = masked(old_logprobs, loss_mask) - masked(rollout_logprobs, loss_mask)
    log_weights = WEIGHT_LEVELS[level].function(log_ratios, loss_mask, cu_seqlens)
    raw = masked(log_weights.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp(), loss_mask)
    weights = masked(torch.ones_like(raw), loss_mask) if mode is None else _bounded(raw, mode, low, high)
    changed = torch.zeros_like(raw) if mode is None else (weights != raw).float()
    difference = log_ratios.abs()
    return weights, Metrics(
        {
            "loss/is_weight_mean": token_mean(raw, loss_mask),
            "loss/is_weight_max": Max(raw.max()),
            "loss/is_masked_fraction": token_mean(changed, loss_mask),
            "rollout/logprob_diff_mean": token_mean(difference, loss_mask),
            "rollout/logprob_diff_max": Max(difference.max()),
        }
    )


def _bounded(weights: Tensor, mode: str, low: float, high: float) -> Tensor:
    if mode not in ROLLOUT_CORRECTIONS:
        raise ValueError(
            f"rollout correction: mode={mode!r} is not one of {', '.join(ROLLOUT_CORRECTIONS)}, or None"
        )
    if not 0 <= low <= 1 <= high:
        raise ValueError(
            f"rollout correction: low={low}, high={high}, but wanted 0 <= low <= 1 <= high "
            "(a token on which trainer and engine agree has weight 1 and must be left alone)"
        )
    return ROLLOUT_CORRECTIONS[mode].function(weights, low, high)
