"""Losses of preference learning: one term per pair of responses, or per judged response (KTO).

Shapes: [P] pairs, or examples for KTO. `*_sums` are Σ log-probs over the response tokens of a sequence (the
policy's with gradient, the reference's without) and `*_tokens` their numbers. Every function returns
`(loss [P], metrics)`, where each metric is [P] too and without gradient: nothing is averaged and nothing
masked, so that the caller can leave out padding pairs. These have 0 tokens and sums of 0, for
which everything here is finite. All results are fp32.

h = (log π(w) - log π_ref(w)) - (log π(l) - log π_ref(l)), w the chosen and l the rejected response.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# The odds p/(1-p) have a pole at p = 1, where a mean log-prob may well be after rounding.
MAX_MEAN_LOGPROB = -1e-6

PreferenceLoss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def dpo(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    ref_chosen_sums: Tensor | None,
    ref_rejected_sums: Tensor | None,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log σ(β·h) (arXiv 2305.18290). `gamma` has no effect."""
    _refuse_label_smoothing("dpo", label_smoothing)
    chosen = _log_ratio("dpo", chosen_sums, ref_chosen_sums)
    rejected = _log_ratio("dpo", rejected_sums, ref_rejected_sums)
    return -logsigmoid(beta * (chosen - rejected)), pair_metrics(beta * chosen, beta * rejected)


def ipo(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    ref_chosen_sums: Tensor | None,
    ref_rejected_sums: Tensor | None,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(h - 1/(2β))² (arXiv 2310.12036, its τ is β): h has a finite target. `gamma` has no effect.

    Of sums over the responses' tokens, as in the paper's equation 17, where π(y|x) is a whole response's. TRL
    takes means: for responses of n tokens its β is n times this one.
    """
    _refuse_label_smoothing("ipo", label_smoothing)
    chosen = _log_ratio("ipo", chosen_sums, ref_chosen_sums)
    rejected = _log_ratio("ipo", rejected_sums, ref_rejected_sums)
    loss = (chosen - rejected - 1.0 / (2.0 * beta)).square()
    return loss, pair_metrics(beta * chosen, beta * rejected)


def cdpo(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    ref_chosen_sums: Tensor | None,
    ref_rejected_sums: Tensor | None,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-(1-s)·log σ(β·h) - s·log σ(-β·h), s = `label_smoothing` the fraction of labels that are
    swapped (Mitchell 2023). `gamma` has no effect.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing} must be in [0, 0.5): from a half on, the rejected response "
            "would be the better one"
        )
    chosen = _log_ratio("cdpo", chosen_sums, ref_chosen_sums)
    rejected = _log_ratio("cdpo", rejected_sums, ref_rejected_sums)
    margin = beta * (chosen - rejected)
    loss = -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return loss, pair_metrics(beta * chosen, beta * rejected)


def orpo(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    ref_chosen_sums: Tensor | None,
    ref_rejected_sums: Tensor | None,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """NLL(w) - β·log σ(log odds(w) - log odds(l)), without a reference (arXiv 2403.07691, its λ is β).

    odds = p/(1-p) of p = exp(mean log-prob of the response's tokens), whose negative mean is the NLL too. In
    metrics, β · mean log-prob takes the place of the reward. `gamma` has no effect.
    """
    _refuse_label_smoothing("orpo", label_smoothing)
    chosen, rejected = _means(chosen_sums, chosen_tokens), _means(rejected_sums, rejected_tokens)
    loss = -chosen - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))
    return loss, pair_metrics(beta * chosen, beta * rejected)


def simpo(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    ref_chosen_sums: Tensor | None,
    ref_rejected_sums: Tensor | None,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log σ(β·(mean log-prob of w - mean log-prob of l) - γ), without a reference (arXiv 2405.14734).

    γ is the margin itself, not its ratio to β.
    """
    _refuse_label_smoothing("simpo", label_smoothing)
    chosen = beta * _means(chosen_sums, chosen_tokens)
    rejected = beta * _means(rejected_sums, rejected_tokens)
    return -logsigmoid(chosen - rejected - gamma), pair_metrics(chosen, rejected)


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "dpo": dpo,
    "ipo": ipo,
    "cdpo": cdpo,
    "orpo": orpo,
    "simpo": simpo,
}


def chosen_nll(chosen_sums: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Negative mean log-prob of each chosen response, [P]: the NLL term added to DPO (arXiv 2404.19733)."""
    return -_means(chosen_sums, chosen_tokens)


def kto(
    sums: Tensor,  # [P]
    ref_sums: Tensor,  # [P]
    desirable: Tensor,  # [P] 1 for a desirable response, 0 for an undesirable one
    kl: Tensor,  # scalar, `kto_reference_point`
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """w_d·(1 - σ(β·(h - KL))) or w_u·(1 - σ(β·(KL - h))), h = log π - log π_ref (arXiv 2402.01306).

    Rewards in the metrics are 0 at examples of the other kind: divide their sums by those of
    `data/desirable` and `data/undesirable`. A response is ranked right when h is on its label's side of KL.
    """
    is_desirable = desirable > 0
    log_ratio = sums.float() - ref_sums.float()
    margin = beta * (log_ratio - kl.detach().float())
    # 1 - σ(x) = σ(-x), which keeps its digits where σ(x) is near 1.
    loss = torch.where(
        is_desirable, desirable_weight * torch.sigmoid(-margin), undesirable_weight * torch.sigmoid(margin)
    )
    reward = beta * log_ratio.detach()
    right = torch.where(is_desirable, margin > 0, margin < 0)
    return loss, {
        "reward/desirable": torch.where(is_desirable, reward, 0.0),
        "reward/undesirable": torch.where(is_desirable, 0.0, reward),
        "reward/accuracy": right.float(),
        "data/desirable": is_desirable.float(),
        "data/undesirable": 1.0 - is_desirable.float(),
    }


@torch.no_grad()
def kto_kl(mismatched_sums: Tensor, ref_mismatched_sums: Tensor) -> Tensor:
    """Count and Σ (log π - log π_ref) of responses under prompts that are not theirs, [2] in float64.

    Contributions of micro-batches and ranks add up; leave out padding beforehand.
    """
    log_ratio = mismatched_sums.double() - ref_mismatched_sums.double()
    count = torch.tensor(log_ratio.numel(), dtype=torch.float64, device=log_ratio.device)
    return torch.stack([count, log_ratio.sum()])


def kto_reference_point(contributions: Tensor) -> Tensor:
    """max(0, mean log-ratio) from the global batch's `kto_kl` [2]: a scalar in fp32; 0 without responses."""
    count, total = contributions.detach().double().unbind()
    return (total / count.clamp_min(1.0)).clamp_min(0.0).float()


def pair_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """Both rewards, their difference, and 1 where the chosen response has the higher one; each [P]."""
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    return {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/margin": chosen - rejected,
        "reward/accuracy": (chosen > rejected).float(),
    }


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p/(1-p)) from log p; log p counts as -1e-6 above that (no gradient there)."""
    logprobs = logprobs.clamp_max(MAX_MEAN_LOGPROB)
    # log(1 - exp(x)) where each form is accurate on one side of x = -ln 2 (Mächler 2012).
    near_one = torch.log(-torch.expm1(logprobs))
    near_zero = torch.log1p(-torch.exp(logprobs))
    return logprobs - torch.where(logprobs > -math.log(2.0), near_one, near_zero)


def _log_ratio(name: str, sums: Tensor, ref_sums: Tensor | None) -> Tensor:
    if ref_sums is None:
        raise ValueError(f"loss={name} compares with a reference: ref_chosen_sums and ref_rejected_sums")
    return sums.float() - ref_sums.float()


def _means(sums: Tensor, tokens: Tensor) -> Tensor:
    return sums.float() / tokens.float().clamp_min(1.0)


def _refuse_label_smoothing(name: str, label_smoothing: float) -> None:
    if label_smoothing:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no effect on loss={name}: leave it out, or use cdpo"
        )
