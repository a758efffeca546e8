"""Policy losses: per-token terms to minimise, before aggregation.

Every function takes the policy's `logprobs` (with gradient), `old_logprobs` of the policy before this step's
updates, and `advantages`, all [T], and returns `(per_token_loss [T], metrics)`. The losses are fp32 and 0
outside the mask, whatever the inputs are there; metrics are means over loss tokens.

ratio = exp(logprobs - old_logprobs), the log-ratio clamped at ±20 (no gradient beyond).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayrlhf.algorithms.aggregate import masked, sequence_counts, sequence_sums
from rayrlhf.algorithms.kl import k3
from rayrlhf.algorithms.metrics import Metrics, token_mean
from rayrlhf.batch import sequence_ids_of

MAX_LOG_RATIO = 20.0


def ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """-min(ratio·A, clip(ratio, 1-ε_low, 1+ε_high)·A), per token (arXiv 1707.06347).

    ε_low ≠ ε_high is DAPO's clip-higher (arXiv 2503.14476). With `dual_clip` c > 1, tokens with A < 0 use
    -max(min(…), c·A) (arXiv 1912.09729).
    """
    logprobs, old_logprobs = masked(logprobs, loss_mask), masked(old_logprobs, loss_mask)
    ratio = _ratio(logprobs - old_logprobs)
    loss, metrics = _clipped(ratio, masked(advantages, loss_mask), loss_mask, clip_low, clip_high, dual_clip)
    return loss, metrics + _drift(logprobs, old_logprobs, ratio, loss_mask)


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped term with a sequence's ratio s = exp(mean token log-ratio) on each of its tokens
    (arXiv 2507.18071).

    In the form of its section 4.3, GSPO-token: a token's ratio is sg(s)·π/sg(π). Its value is s and its
    gradient is that of the token's own log-probability, so tokens may have different advantages. Where all
    of a sequence are equal, value and gradient under `sequence_mean` are those of the paper's section 4.1.
    The mean is clamped, not its summands. Clip ranges are far narrower than PPO's (the paper: 3e-4 and 4e-4).
    """
    logprobs, old_logprobs = masked(logprobs, loss_mask), masked(old_logprobs, loss_mask)
    counts = sequence_counts(loss_mask, cu_seqlens).clamp_min(1.0)
    mean_log_ratio = sequence_sums(logprobs - old_logprobs, loss_mask, cu_seqlens) / counts
    of_sequence = mean_log_ratio.detach()[sequence_ids_of(cu_seqlens)]
    ratio = _ratio(of_sequence + (logprobs - logprobs.detach()))
    loss, metrics = _clipped(ratio, masked(advantages, loss_mask), loss_mask, clip_low, clip_high, dual_clip)
    return loss, metrics + _drift(logprobs, old_logprobs, ratio, loss_mask)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Metrics]:
    """-sg(clip(ratio, 1-ε_low, 1+ε_high))·A·logprobs (arXiv 2506.13585).

    The clipped ratio is only a weight: a clipped token keeps its gradient, unlike in PPO.
    """
    logprobs, old_logprobs = masked(logprobs, loss_mask), masked(old_logprobs, loss_mask)
    ratio = _ratio(logprobs - old_logprobs).detach()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    metrics = Metrics({"loss/clip_fraction": token_mean(weight != ratio, loss_mask)})
    loss = masked(-weight * masked(advantages, loss_mask) * logprobs, loss_mask)
    return loss, metrics + _drift(logprobs, old_logprobs, ratio, loss_mask)


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    tau_pos: float,
    tau_neg: float,
) -> tuple[Tensor, Metrics]:
    """-(4/τ)·σ(τ·(ratio - 1))·A, τ = `tau_pos` where A > 0 and `tau_neg` elsewhere (arXiv 2511.20347).

    A soft gate in place of the clip: the gradient is the policy gradient at ratio 1 and fades smoothly as the
    ratio leaves it, the faster the larger τ. No token is clipped.
    """
    logprobs, old_logprobs = masked(logprobs, loss_mask), masked(old_logprobs, loss_mask)
    advantages = masked(advantages, loss_mask)
    ratio = _ratio(logprobs - old_logprobs)
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    gate = torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau
    metrics = Metrics({"loss/clip_fraction": token_mean(torch.zeros_like(logprobs), loss_mask)})
    return masked(-gate * advantages, loss_mask), metrics + _drift(logprobs, old_logprobs, ratio, loss_mask)


def reinforce(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Metrics]:
    """-A·logprobs (Williams 1992): on-policy, so the theorem holds only for the first update of a batch.

    There is no ratio to clip; `old_logprobs` feed the metrics only.
    """
    logprobs, old_logprobs = masked(logprobs, loss_mask), masked(old_logprobs, loss_mask)
    metrics = Metrics({"loss/clip_fraction": token_mean(torch.zeros_like(logprobs), loss_mask)})
    loss = masked(-masked(advantages, loss_mask) * logprobs, loss_mask)
    return loss, metrics + _drift(logprobs, old_logprobs, _ratio(logprobs - old_logprobs), loss_mask)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped(
    ratio: Tensor,  # [T]
    advantages: Tensor,  # [T] 0 outside the mask
    loss_mask: Tensor,  # [T]
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Metrics]:
    """PPO's pessimistic term. A token counts as clipped when the bound decides it, i.e. its gradient is 0."""
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(
            f"dual_clip={dual_clip} must be > 1 (it bounds the loss of tokens with a negative advantage)"
        )
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    metrics = Metrics({"loss/clip_fraction": token_mean(clipped < unclipped, loss_mask)})
    if dual_clip is not None:
        bound = dual_clip * advantages
        bounded = (advantages < 0) & (bound > objective)
        objective = torch.where(bounded, bound, objective)
        metrics["loss/dual_clip_fraction"] = token_mean(bounded, loss_mask)
    return masked(-objective, loss_mask), metrics


def _drift(logprobs: Tensor, old_logprobs: Tensor, ratio: Tensor, loss_mask: Tensor) -> Metrics:
    """Drift of the policy since the batch was sampled: KL(old || policy) by k3, and the ratio."""
    approx_kl = k3(old_logprobs.detach(), logprobs.detach())
    return Metrics(
        {"loss/approx_kl": token_mean(approx_kl, loss_mask), "loss/ratio": token_mean(ratio, loss_mask)}
    )
